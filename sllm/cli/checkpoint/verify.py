"""`sllm checkpoint verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sllm.cli.checkpoint.options import OptionalCheckpointArgument, PathOption, one_of
from sllm.cli.failures import reported
from sllm.cli.options import (
    ContextOption,
    ControllerOption,
    NodesOption,
    OutputOption,
    Patience,
    TimeoutOption,
    WaitOption,
    Where,
)
from sllm.cli.output import Format, emit_line
from sllm.cli.progress import open_progress
from sllm.cli.session import change, new_request_id
from sllm.cli.units import size_text
from sllm.core.ids import checkpoint_name, node_name

EXAMPLE = """
sllm checkpoint verify demo-model
sllm checkpoint verify demo-model --node node-2 --deep
sllm checkpoint verify --path /fast/llama
"""


def verify(
    name: OptionalCheckpointArgument = None,
    path: PathOption = None,
    deep: Annotated[bool, typer.Option("--deep", help="Compute the sha256 of all bytes, too.")] = False,
    node: NodesOption = None,
    wait: WaitOption = True,
    timeout: TimeoutOption = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import VerifyCheckpointRequest

    with reported(output):
        asked = one_of(name, path)
        if isinstance(asked, Path):
            _verify_here(asked, deep, output)
            return
        request = VerifyCheckpointRequest(
            request_id=new_request_id(),
            name=checkpoint_name(asked),
            nodes=tuple(node_name(each) for each in node or ()),
            deep=deep,
        )
    where = Where(output=output, context=context, controller=controller)
    change(where, Patience(wait=wait, timeout=timeout), lambda client: client.verify_checkpoint(request))


def _verify_here(folder: Path, deep: bool, output: Format) -> None:
    from sllm.cli.checkpoint.local import manifest_object, shares
    from sllm.loader.verifying import verify as verify_folder

    with open_progress(f"verify {folder.name}") as progress:
        found = verify_folder(folder, deep=deep, progress=shares(progress, "reading"))
    line = f"{folder}: in order, {found.chunks} chunks, {found.files} files, {size_text(found.size_bytes)}"
    if found.deep:
        line += ", every sha256"
    emit_line(output, line=line, data=manifest_object(folder, found.manifest), name=str(folder))
