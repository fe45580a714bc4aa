"""A checkpoint on the command line: one of the cluster, by its name, or one of this machine, by its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sllm.errors import InvalidArgument

OptionalCheckpointArgument = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="Name of the checkpoint.", show_default=False)
]
PathOption = Annotated[
    str | None, typer.Option("--path", metavar="FOLDER", help="A converted checkpoint on this machine instead.")
]


def one_of(name: str | None, path: str | None) -> str | Path:
    """Return the one that was given. Raises InvalidArgument."""
    if name is not None and path is None:
        return name
    if path is not None and name is None:
        from sllm.loader.folder import checked_path

        return checked_path(path)
    raise InvalidArgument("name a checkpoint, or give its --path", hint="one of the two, not both")
