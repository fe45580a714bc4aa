"""`sllm cordon`."""

from __future__ import annotations

from sllm.cli.options import ContextOption, ControllerOption, OutputOption, PlaceArgument, Where
from sllm.cli.output import Format
from sllm.cli.places import close_or_open

EXAMPLE = """
sllm cordon node-1
sllm cordon node-1/gpu-0
"""


def cordon(
    place: PlaceArgument,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    close_or_open(place, Where(output=output, context=context, controller=controller), cordoned=True)
