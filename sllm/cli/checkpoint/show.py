"""`sllm checkpoint show`."""

from __future__ import annotations

from pathlib import Path

from sllm.cli import rows, tables
from sllm.cli.checkpoint.options import OptionalCheckpointArgument, PathOption, one_of
from sllm.cli.failures import reported
from sllm.cli.options import ContextOption, ControllerOption, OutputOption, Where
from sllm.cli.output import Format, emit
from sllm.cli.session import ask
from sllm.errors import NotFound

EXAMPLE = """
sllm checkpoint show demo-model -o json
sllm checkpoint show --path /fast/llama
"""


def show(
    name: OptionalCheckpointArgument = None,
    path: PathOption = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    with reported(output):
        asked = one_of(name, path)
        if isinstance(asked, Path):
            _show_here(asked, output)
            return
    _show_in_cluster(asked, Where(output=output, context=context, controller=controller))


def _show_in_cluster(name: str, where: Where) -> None:
    from sllm.rpc.control import Empty

    found = ask(where, lambda client: client.list_checkpoints(Empty())).checkpoints
    with reported(where.output):
        row = next((row for row in found if row.checkpoint.name == name), None)
        if row is None:
            raise NotFound(f"there is no checkpoint {name!r}", hint="see `sllm checkpoint list`")
    emit(where.output, tables=tables.checkpoint_details(row), data=rows.checkpoint_row(row), names=[name])


def _show_here(folder: Path, output: Format) -> None:
    from sllm.cli.checkpoint.local import manifest_object, tensor_objects
    from sllm.loader.folder import read_manifest

    manifest = read_manifest(folder)
    data = {**manifest_object(folder, manifest), "tensors": tensor_objects(manifest)}
    emit(output, tables=tables.manifest_details(folder, manifest), data=data, names=list(manifest.tensors))
