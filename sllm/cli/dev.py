"""`sllm dev`: a local cluster in the foreground, every process a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sllm.cli.failures import reported
from sllm.cli.local.layout import Engine, Wish
from sllm.cli.options import OutputOption
from sllm.cli.output import Format
from sllm.cli.roles import require_engine

EXAMPLE = """
sllm dev
sllm dev --nodes 4 --gateway-port 0 --state /tmp/cluster
sllm dev --set controller.node_lease_s=30 --set agent.store.dram_bytes=1000000000
"""


def dev(
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, max=64, help="Nodes, one agent each.")] = 2,
    devices_per_node: Annotated[
        int, typer.Option("--devices-per-node", metavar="N", min=1, max=64, help="Devices of each node.")
    ] = 1,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="DIR", help="Folder for everything.", show_default="$SLLM_HOME/dev"),
    ] = None,
    gateway_port: Annotated[
        int,
        typer.Option(
            "--gateway-port", metavar="PORT", min=0, max=65535, help="Port of the OpenAI API; 0: any free one."
        ),
    ] = 8080,
    controller_port: Annotated[
        int,
        typer.Option(
            "--controller-port", metavar="PORT", min=0, max=65535, help="Port of the controller; 0: any free one."
        ),
    ] = 7700,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="ROLE.KEY=VALUE",
            help="A value of the controller's, the gateway's or every agent's configuration; may be repeated.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option("--engine", hidden=True)] = Engine.VLLM,
    output: OutputOption = Format.TABLE,
) -> None:
    with reported(output):
        require_engine("`sllm dev`")  # with the fake engine too: the gateway's front end is vLLM's
        from sllm.cli.context import config_path
        from sllm.cli.local.layout import parse_setting
        from sllm.cli.local.run import run

        wish = Wish(
            nodes=nodes,
            devices_per_node=devices_per_node,
            gateway_port=gateway_port,
            controller_port=controller_port,
            engine=engine,
            state=(state or config_path().parent / "dev").absolute(),
            settings=tuple(parse_setting(text) for text in settings or ()),
        )
        run(wish, output)
