"""`sllm logs`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sllm.cli.options import ContextOption, ControllerOption, OutputOption, Where
from sllm.cli.output import Format
from sllm.cli.session import ask

if TYPE_CHECKING:
    from sllm.rpc.control import ControlClient

EXAMPLE = """
sllm logs rep-1f0c2a77b1e2
sllm logs node-1 --lines 50
"""


def logs(
    target: Annotated[
        str, typer.Argument(metavar="REPLICA|NODE", help="A replica's id or a node's name.", show_default=False)
    ],
    lines: Annotated[int, typer.Option("-n", "--lines", metavar="N", min=1, help="Lines, counted from the end.")] = 200,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import ReadLogsRequest

    async def read(client: ControlClient) -> str:
        request = ReadLogsRequest(target=target, lines=lines)
        return "".join([chunk.text async for chunk in client.read_logs(request)])

    text = ask(Where(output=output, context=context, controller=controller), read)
    if output is Format.JSON:
        print(json.dumps(text.splitlines(), indent=2, ensure_ascii=False))
    elif output is Format.NAME:
        print(target)
    else:
        sys.stdout.write(text if text.endswith("\n") or not text else f"{text}\n")
