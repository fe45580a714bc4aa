"""`sllm checkpoint add`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

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
from sllm.errors import InvalidArgument

EXAMPLE = """
sllm checkpoint add demo-model examples/demo-model
sllm checkpoint add llama /models/llama --node node-1 --node node-2
"""


def add(
    name: CheckpointArgument,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder of safetensors, as the node sees it.", show_default=False)
    ],
    node: NodesOption = None,
    all_nodes: Annotated[bool, typer.Option("--all", help="Copy to every node.")] = False,
    wait: WaitOption = True,
    timeout: TimeoutOption = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.loader.folder import checked_path
    from sllm.rpc.control import AddCheckpointRequest

    with reported(output):
        if node and all_nodes:
            raise InvalidArgument("--node and --all exclude each other", hint="leave one of them out")
        request = AddCheckpointRequest(
            request_id=new_request_id(),
            name=checkpoint_name(name),
            # The node does not know the folder that this command was called in.
            source=os.path.abspath(checked_path(source)),
            nodes=tuple(node_name(each) for each in node or ()),
            all_nodes=all_nodes,
        )
    where = Where(output=output, context=context, controller=controller)
    change(where, Patience(wait=wait, timeout=timeout), lambda client: client.add_checkpoint(request))
