"""`sllm checkpoint convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from sllm.cli.failures import reported
from sllm.cli.options import OutputOption
from sllm.cli.output import Format, emit_line
from sllm.cli.progress import open_progress
from sllm.cli.units import size_text

EXAMPLE = """
sllm checkpoint convert /models/llama /fast/llama
python -c 'import sllm.loader; sllm.loader.load("/fast/llama")'
"""


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of safetensors.", show_default=False)],
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="Folder to make; one that is there is replaced.")
    ],
    output: OutputOption = Format.TABLE,
) -> None:
    from sllm.cli.checkpoint.local import manifest_object, shares
    from sllm.loader.conversion import convert as convert_folder
    from sllm.loader.folder import checked_path

    with reported(output):
        folder, made = checked_path(source), checked_path(destination)
        with open_progress(f"convert {folder.name}") as progress:
            manifest = convert_folder(folder, made, progress=shares(progress, "copying"))
    line = f"{made}: {len(manifest.tensors)} tensors, {size_text(manifest.tensor_bytes)}"
    emit_line(output, line=line, data=manifest_object(made, manifest), name=str(made))
