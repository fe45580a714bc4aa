"""`sllm deploy`."""

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
from sllm.cli.units import duration_s
from sllm.core.deployment import DeploymentSpec
from sllm.core.engine_args import normalized
from sllm.core.ids import checkpoint_name, deployment_name
from sllm.errors import InvalidArgument

EXAMPLE = """
sllm deploy demo --checkpoint demo-model --max 2 --keep-alive 5m
sllm deploy org/chat --checkpoint llama --min 1 --engine-arg max-logprobs=20
sllm deploy demo --checkpoint demo-model --min 2 --dry-run
"""

DEFAULT_MAX = 2


def deploy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Model id that clients ask for.", show_default=False)],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="NAME", help="Checkpoint to serve.", show_default=False)
    ],
    minimum: Annotated[int, typer.Option("--min", metavar="N", help="Replicas kept at least.")] = 0,
    maximum: Annotated[
        int | None,
        typer.Option(
            "--max", metavar="N", help="Replicas at most.", show_default=f"{DEFAULT_MAX}, or --min if that is more"
        ),
    ] = None,
    devices: Annotated[int, typer.Option("--devices", metavar="N", help="Devices of one replica.")] = 1,
    keep_alive: Annotated[
        str, typer.Option("--keep-alive", metavar="DURATION", help="An unneeded replica is kept this long.")
    ] = "60s",
    target_concurrency: Annotated[
        int, typer.Option("--target-concurrency", metavar="N", help="Requests per replica before another is added.")
    ] = 8,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len", metavar="N", help="Longest context in tokens.", show_default="the checkpoint's own"
        ),
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option("--engine-arg", metavar="KEY=VALUE", help="Option of the engine; may be repeated."),
    ] = None,
    dry_run: DryRunOption = False,
    wait: WaitOption = True,
    timeout: TimeoutOption = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import DeployRequest

    with reported(output):
        spec = DeploymentSpec(
            name=deployment_name(name),
            checkpoint=checkpoint_name(checkpoint),
            min_replicas=minimum,
            max_replicas=max(DEFAULT_MAX, minimum) if maximum is None else maximum,
            devices=devices,
            keep_alive_s=duration_s(keep_alive),
            target_concurrency=target_concurrency,
            max_model_len=max_model_len,
            engine_args=_engine_args(engine_arg or []),
        )
        request = DeployRequest(request_id=new_request_id(), spec=spec)
    where = Where(output=output, context=context, controller=controller)
    if dry_run:
        explanations.preview(where, lambda client: client.plan_deploy(request))
    else:
        change(where, Patience(wait=wait, timeout=timeout), lambda client: client.deploy(request))


def _engine_args(pairs: list[str]) -> dict[str, str]:
    args: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise InvalidArgument(f"--engine-arg {pair!r} is not KEY=VALUE", hint="for example --engine-arg seed=7")
        if normalized(name) in args:
            raise InvalidArgument(f"--engine-arg {normalized(name)!r} is given twice")
        args[normalized(name)] = value
    return args
