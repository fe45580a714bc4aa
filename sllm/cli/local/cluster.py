"""The processes of a local cluster: started in order, kept running, stopped in the opposite order."""

from __future__ import annotations

import asyncio
import sys
import tomllib
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from sllm.cli import toml_text
from sllm.cli.local import layout, orphans
from sllm.cli.local.layout import LOOPBACK, Machine, Wish
from sllm.cli.local.notifications import Notifications
from sllm.cli.local.supervisor import Backoff, Child, Program, Say
from sllm.cli.private_files import write_private
from sllm.config import AgentConfig, ControllerConfig, GatewayConfig, check
from sllm.errors import OperationFailed

T = TypeVar("T")

# Followed by the role's verb and its configuration.
LAUNCHER = (sys.executable, "-m", "sllm.cli.main")


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a running cluster is reached, as HOST:PORT."""

    controller: str
    gateway: str


def check_settings(wish: Wish, machine: Machine) -> None:
    """Raise the error of a setting that its role would refuse, before anything is started."""
    somewhere = f"{LOOPBACK}:0"

    def written(config: dict[str, Any], role: str) -> dict[str, Any]:
        return tomllib.loads(toml_text.dumps(layout.overridden(config, wish.settings, role)))

    origin = "the configuration, with --set"
    check(written(layout.controller_config(wish, somewhere), "controller"), ControllerConfig, origin=origin)
    check(written(layout.gateway_config(wish, somewhere, somewhere), "gateway"), GatewayConfig, origin=origin)
    check(written(layout.agent_config(wish, machine, 0, somewhere), "agent"), AgentConfig, origin=origin)


class LocalCluster:
    """`bring_up` once, then `stop` (or `kill`) once, also if bringing up failed or was cancelled."""

    def __init__(self, wish: Wish, machine: Machine, say: Say, launcher: tuple[str, ...] = LAUNCHER) -> None:
        self._wish = wish
        self._machine = machine
        self._say = say
        self._launcher = launcher
        self._notifications = Notifications()
        self._children: list[list[Child]] = []  # in the order of stopping
        orphans.adopt(lambda: {child.pid for group in self._children for child in group if child.pid is not None})

    async def bring_up(self) -> Addresses:
        """Start all processes and return when all are ready."""
        wish, machine = self._wish, self._machine
        asked = f"{LOOPBACK}:{wish.controller_port}"
        controller = await self._start_alone("controller", layout.controller_config(wish, asked))
        # A controller that is started again must be found where it was.
        self._write_config("controller", "controller", layout.controller_config(wish, controller))
        agents = [
            self._child("agent", name, layout.agent_config(wish, machine, index, controller))
            for index, name in enumerate(wish.node_names)
        ]
        self._children.insert(0, agents)
        asked = f"{LOOPBACK}:{wish.gateway_port}"
        async with asyncio.TaskGroup() as group:
            for agent in agents:
                group.create_task(agent.start())
            starting = group.create_task(self._start_alone("gateway", layout.gateway_config(wish, asked, controller)))
        gateway = starting.result()
        self._write_config("gateway", "gateway", layout.gateway_config(wish, gateway, controller))
        return Addresses(controller=controller, gateway=gateway)

    async def stop(self) -> None:
        """Stop the gateway, then the agents with their engine hosts, then the controller; leave no process."""
        try:
            for group in self._children:
                await asyncio.gather(*(child.stop() for child in group))
        finally:
            self._notifications.close()
            orphans.end_all()

    def kill(self) -> None:
        """End all processes now; `stop` is still needed."""
        for group in self._children:
            for child in group:
                child.kill()

    async def _start_alone(self, role: str, config: dict[str, Any]) -> str:
        child = self._child(role, role, config)
        self._children.insert(0, [child])
        fields = await child.start()
        address = fields.get("X_ADDRESS")
        if address is None:
            raise OperationFailed(f"the {role} did not say where it listens", hint=f"see {child.program.log}")
        return address

    def _child(self, role: str, name: str, config: dict[str, Any]) -> Child:
        self._write_config(role, name, config)
        path = self._wish.state / "etc" / f"{name}.toml"
        argv = (*self._launcher, role, "--config", str(path))
        log = self._wish.state / "log" / f"{name}.log"
        return Child(Program(name=name, argv=argv, log=log), self._notifications, self._say, Backoff())

    def _write_config(self, role: str, name: str, config: dict[str, Any]) -> None:
        config = layout.overridden(config, self._wish.settings, role)
        write_private(self._wish.state / "etc" / f"{name}.toml", toml_text.dumps(config).encode())


async def unless(stop: asyncio.Event, work: Awaitable[T]) -> T | None:
    """Return the result of `work`, or None if `stop` is set first; then `work` is cancelled."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.wait((task,))
    return None
