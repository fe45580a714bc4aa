"""`sllm delete`."""

from __future__ import annotations

from typing import Annotated

import typer

from sllm.cli.failures import reported
from sllm.cli.options import (
    ContextOption,
    ControllerOption,
    OutputOption,
    Patience,
    TimeoutOption,
    WaitOption,
    Where,
)
from sllm.cli.output import Format
from sllm.cli.session import change, new_request_id
from sllm.core.ids import deployment_name

EXAMPLE = "sllm delete demo"


def delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Deployment to delete.", show_default=False)],
    wait: WaitOption = True,
    timeout: TimeoutOption = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import DeleteRequest

    with reported(output):
        request = DeleteRequest(request_id=new_request_id(), name=deployment_name(name))
    where = Where(output=output, context=context, controller=controller)
    change(where, Patience(wait=wait, timeout=timeout), lambda client: client.delete(request))
