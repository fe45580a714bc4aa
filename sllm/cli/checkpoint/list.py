"""`sllm checkpoint list`."""

from __future__ import annotations

from sllm.cli import rows, tables
from sllm.cli.options import ContextOption, ControllerOption, OutputOption, Where
from sllm.cli.output import Format, emit
from sllm.cli.session import ask

EXAMPLE = "sllm checkpoint list"


def list_(
    output: OutputOption = Format.TABLE, context: ContextOption = None, controller: ControllerOption = None
) -> None:
    from sllm.rpc.control import Empty

    where = Where(output=output, context=context, controller=controller)
    found = ask(where, lambda client: client.list_checkpoints(Empty())).checkpoints
    emit(
        output,
        tables=[tables.checkpoints(found)],
        data=[rows.checkpoint_row(row) for row in found],
        names=[row.checkpoint.name for row in found],
    )
