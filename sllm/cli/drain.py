"""`sllm drain`."""

from __future__ import annotations

from typing import Annotated

import typer

from sllm.cli.failures import reported
from sllm.cli.options import (
    ContextOption,
    ControllerOption,
    DryRunOption,
    NodeArgument,
    OutputOption,
    Patience,
    TimeoutOption,
    WaitOption,
    Where,
)
from sllm.cli.output import Format
from sllm.cli.session import change, new_request_id, preview
from sllm.cli.units import duration_s
from sllm.core.ids import node_name

EXAMPLE = """
sllm drain node-1
sllm drain node-1 --deadline 10m --no-wait
sllm drain node-1 --dry-run
"""


def drain(
    node: NodeArgument,
    deadline: Annotated[
        str, typer.Option("--deadline", metavar="DURATION", help="Time in which the node is to be empty.")
    ] = "120s",
    dry_run: DryRunOption = False,
    wait: WaitOption = True,
    timeout: TimeoutOption = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import DrainRequest

    with reported(output):
        asked = DrainRequest(request_id=new_request_id(), node=node_name(node), deadline_s=duration_s(deadline))
    where = Where(output=output, context=context, controller=controller)
    if dry_run:
        preview(where, lambda client: client.plan_drain(asked))
    else:
        change(where, Patience(wait=wait, timeout=timeout), lambda client: client.drain(asked))
