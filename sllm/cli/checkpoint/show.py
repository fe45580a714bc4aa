"""`sllm checkpoint show`."""

from __future__ import annotations

from sllm.cli import rows, tables
from sllm.cli.failures import reported
from sllm.cli.options import CheckpointArgument, ContextOption, ControllerOption, OutputOption, Where
from sllm.cli.output import Format, emit
from sllm.cli.session import ask
from sllm.errors import NotFound

EXAMPLE = "sllm checkpoint show demo-model -o json"


def show(
    name: CheckpointArgument,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import Empty

    where = Where(output=output, context=context, controller=controller)
    found = ask(where, lambda client: client.list_checkpoints(Empty())).checkpoints
    with reported(output):
        row = next((row for row in found if row.checkpoint.name == name), None)
        if row is None:
            raise NotFound(f"there is no checkpoint {name!r}", hint="see `sllm checkpoint list`")
    emit(output, tables=tables.checkpoint_details(row), data=rows.checkpoint_row(row), names=[row.checkpoint.name])
