"""`sllm nodes`."""

from __future__ import annotations

from sllm.cli import rows, tables
from sllm.cli.options import ContextOption, ControllerOption, OutputOption, Where
from sllm.cli.output import Format, emit
from sllm.cli.session import ask

EXAMPLE = "sllm nodes"


def nodes(
    output: OutputOption = Format.TABLE, context: ContextOption = None, controller: ControllerOption = None
) -> None:
    from sllm.rpc.control import Empty

    where = Where(output=output, context=context, controller=controller)
    found = ask(where, lambda client: client.get_status(Empty())).nodes
    emit(
        output,
        tables=[tables.nodes(found)],
        data=[rows.node_row(node) for node in found],
        names=[node.report.name for node in found],
    )
