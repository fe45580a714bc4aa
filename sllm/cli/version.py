"""`sllm version`."""

from __future__ import annotations

import platform

from sllm.cli.options import OutputOption
from sllm.cli.output import Format, emit_line
from sllm.version import VERSION

EXAMPLE = "sllm version -o json"


def version(output: OutputOption = Format.TABLE) -> None:
    python = platform.python_version()
    emit_line(
        output, line=f"sllm {VERSION} (Python {python})", data={"version": VERSION, "python": python}, name=VERSION
    )
