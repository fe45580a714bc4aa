"""`sllm requests`."""

from __future__ import annotations

from sllm.cli import rows, tables
from sllm.cli.options import ContextOption, ControllerOption, OutputOption, Where
from sllm.cli.output import Format, emit
from sllm.cli.session import ask

EXAMPLE = "sllm requests"


def requests(
    output: OutputOption = Format.TABLE, context: ContextOption = None, controller: ControllerOption = None
) -> None:
    from sllm.rpc.control import Empty

    where = Where(output=output, context=context, controller=controller)
    found = ask(where, lambda client: client.list_requests(Empty())).requests
    emit(
        output,
        tables=[tables.requests(found)],
        data=[rows.request_row(row) for row in found],
        names=[row.id for row in found],
    )
