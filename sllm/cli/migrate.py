"""`sllm migrate`."""

from __future__ import annotations

from typing import Annotated

import typer

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
from sllm.cli.session import change, new_request_id, preview
from sllm.core.ids import ReplicaId, RequestId, node_name
from sllm.errors import InvalidArgument

EXAMPLE = """
sllm migrate req-0a1b2c3d4e5f6071 --to node-2
sllm migrate --replica rep-0a1b2c3d4e5f --to node-2 --dry-run
"""


def migrate(
    node: Annotated[str, typer.Option("--to", metavar="NODE", help="Node to move to.", show_default=False)],
    request: Annotated[str | None, typer.Argument(metavar="REQUEST", help="Request to move.")] = None,
    replica: Annotated[str | None, typer.Option("--replica", metavar="ID", help="Move all that runs on it.")] = None,
    dry_run: DryRunOption = False,
    wait: WaitOption = True,
    timeout: TimeoutOption = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import MigrateRequest

    with reported(output):
        _check_choice(request, replica)
        asked = MigrateRequest(
            request_id=new_request_id(),
            node=node_name(node),
            request=None if request is None else RequestId(request),
            replica=None if replica is None else ReplicaId(replica),
        )
    where = Where(output=output, context=context, controller=controller)
    if dry_run:
        preview(where, lambda client: client.plan_migration(asked))
    else:
        change(where, Patience(wait=wait, timeout=timeout), lambda client: client.migrate(asked))


def _check_choice(request: str | None, replica: str | None) -> None:
    if (request is None) is (replica is None):
        raise InvalidArgument("give either a request or --replica", hint="see `sllm requests` and `sllm status`")
    if request is not None and request.startswith("rep-"):
        raise InvalidArgument(f"{request} is a replica", hint=f"write --replica {request}")
