"""`sllm checkpoint remove`."""

from __future__ import annotations

from sllm.cli.failures import reported
from sllm.cli.options import (
    CheckpointArgument,
    ContextOption,
    ControllerOption,
    NodesOption,
    OutputOption,
    Patience,
    TimeoutOption,
    WaitOption,
    Where,
)
from sllm.cli.output import Format
from sllm.cli.session import change, new_request_id
from sllm.core.ids import checkpoint_name, node_name

EXAMPLE = """
sllm checkpoint remove demo-model
sllm checkpoint remove demo-model --node node-2
"""


def remove(
    name: CheckpointArgument,
    node: NodesOption = None,
    wait: WaitOption = True,
    timeout: TimeoutOption = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import RemoveCheckpointRequest

    with reported(output):
        nodes = tuple(node_name(each) for each in node or ())
        request = RemoveCheckpointRequest(request_id=new_request_id(), name=checkpoint_name(name), nodes=nodes)
    where = Where(output=output, context=context, controller=controller)
    change(where, Patience(wait=wait, timeout=timeout), lambda client: client.remove_checkpoint(request))
