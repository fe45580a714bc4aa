"""Running one process of the cluster in the foreground, from its TOML file, the way systemd does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sllm.errors import InvalidConfiguration

if TYPE_CHECKING:
    from sllm.config import AgentConfig, ControllerConfig, GatewayConfig
    from sllm.log import LogTail

ConfigOption = Annotated[
    Path, typer.Option("-c", "--config", metavar="FILE", help="Its configuration, a TOML file.", show_default=False)
]
RoleConfig = TypeVar("RoleConfig", "ControllerConfig", "GatewayConfig", "AgentConfig")


def run_role(
    config: RoleConfig,
    run: Callable[[RoleConfig, LogTail], Coroutine[Any, Any, None]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> None:
    """Set up the log and run until the process is told to stop."""
    from sllm import log

    tail = log.setup(level=config.log.level, json_lines=config.log.json_lines)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run(config, tail))


def require_engine(what: str) -> None:
    """Raise InvalidConfiguration unless vLLM is installed. It is looked for, not imported."""
    if find_spec("vllm") is None:
        raise InvalidConfiguration(
            f"{what} needs the inference engine, which is not installed",
            hint="install it with `pip install 'sllm[cpu]'`, or 'sllm[gpu]' where there are GPUs",
        )
