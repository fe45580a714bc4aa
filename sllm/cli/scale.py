"""`sllm scale`."""

from __future__ import annotations

from typing import Annotated

import typer

from sllm.cli import explanations
from sllm.cli.failures import reported
from sllm.cli.options import (
    ContextOption,
    ControllerOption,
    DryRunOption,
    OutputOption,
    Patience,
    TimeoutOption,
    WaitOption,
    Where,
)
from sllm.cli.output import Format
from sllm.cli.session import change, new_request_id
from sllm.core.ids import deployment_name
from sllm.errors import InvalidArgument

EXAMPLE = """
sllm scale demo --replicas 0
sllm scale demo --min 1 --max 4
sllm scale demo --replicas 2 --dry-run
"""


def scale(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Deployment to scale.", show_default=False)],
    replicas: Annotated[int | None, typer.Option("--replicas", metavar="N", min=0, help="Have so many now.")] = None,
    minimum: Annotated[int | None, typer.Option("--min", metavar="N", min=0, help="Keep so many at least.")] = None,
    maximum: Annotated[int | None, typer.Option("--max", metavar="N", min=1, help="Have so many at most.")] = None,
    dry_run: DryRunOption = False,
    wait: WaitOption = True,
    timeout: TimeoutOption = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import ScaleRequest

    with reported(output):
        _check_choice(replicas, minimum, maximum)
        request = ScaleRequest(
            request_id=new_request_id(),
            name=deployment_name(name),
            replicas=replicas,
            min_replicas=minimum,
            max_replicas=maximum,
        )
    where = Where(output=output, context=context, controller=controller)
    if dry_run:
        explanations.preview(where, lambda client: client.plan_scale(request))
    else:
        change(where, Patience(wait=wait, timeout=timeout), lambda client: client.scale(request))


def _check_choice(replicas: int | None, minimum: int | None, maximum: int | None) -> None:
    bounds = minimum is not None or maximum is not None
    if bounds == (replicas is not None):
        raise InvalidArgument("give either --replicas, or --min and --max", hint="see `sllm scale --help`")
