"""Executor: gives agents their commands and tells the writer how each ended. It decides nothing.

One client per agent's address; one task per command, so that a slow agent delays no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, cast

from sllm.controller.events import CommandEnded, MigrationEnded, MigrationReported
from sllm.core.ids import MigrationId, ReplicaId
from sllm.core.migration import MigrationOrder
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaSpec
from sllm.core.snapshot import Intent
from sllm.errors import DeadlineExceeded, SllmError, Unavailable
from sllm.rpc.agents import AgentClient, MigrateCommand, PrefetchCommand, StartReplicaCommand, StopReplicaCommand
from sllm.rpc.transport import Tls

log = logging.getLogger(__name__)

MIGRATION_GRACE_S = 15.0


class Executor:
    def __init__(self, *, tls: Tls | None, epoch: int, post: Callable[[object], None]) -> None:
        self.epoch = epoch
        self._tls = tls
        self.post = post
        self._clients: dict[str, AgentClient] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._migrations: dict[MigrationId, asyncio.Task[None]] = {}

    def client(self, address: str) -> AgentClient:
        """The client for an agent; it stays open."""
        if address not in self._clients:
            self._clients[address] = AgentClient(address, self._tls, peer="agent")
        return self._clients[address]

    def start(self, address: str, spec: ReplicaSpec, priority: Priority) -> None:
        """Start a replica, or raise the priority of its start."""
        command = StartReplicaCommand(epoch=self.epoch, spec=spec, priority=priority)
        self.spawn(self._command(spec.id, Intent.RUN, self.client(address).start_replica(command)))

    def end(self, address: str, spec: ReplicaSpec, intent: Intent, drain_s: float) -> None:
        command = StopReplicaCommand(epoch=self.epoch, replica=spec.id, generation=spec.generation, drain_s=drain_s)
        self.spawn(self._command(spec.id, intent, self.client(address).stop_replica(command)))

    def prefetch(self, address: str, spec: ReplicaSpec, instead_of: tuple[str, ...]) -> None:
        """Have a node read ahead. Nobody waits for it: a failure is only logged."""
        command = PrefetchCommand(epoch=self.epoch, spec=spec, instead_of=instead_of)
        self.spawn(_best_effort(self.client(address).prefetch(command), f"{spec.checkpoint} is not read ahead"))

    def migrate(self, address: str, order: MigrationOrder) -> None:
        """Have requests moved, and tell of each as it goes."""
        self._migrations[order.id] = self.spawn(self._migrate(self.client(address), order))

    def cancel(self, migration: MigrationId) -> None:
        """End an order: what has not been handed over stays where it is. Nothing more is told of it."""
        if task := self._migrations.pop(migration, None):
            task.cancel()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work that posts its own outcome; it ends with the executor."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def forget(self, address: str) -> None:
        """Close the client of an agent that is not there any more."""
        client = self._clients.pop(address, None)
        if client:
            await client.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    async def _command(self, replica: ReplicaId, intent: Intent, call: Awaitable[object]) -> None:
        error = await outcome(call)
        self.post(CommandEnded(replica=replica, intent=intent, error=error))

    async def _migrate(self, client: AgentClient, order: MigrationOrder) -> None:
        error = await outcome(self._relay(client, order))
        self._migrations.pop(order.id, None)
        self.post(MigrationEnded(migration=order.id, error=error))

    async def _relay(self, client: AgentClient, order: MigrationOrder) -> None:
        command = MigrateCommand(epoch=self.epoch, order=order)
        try:
            # The source keeps to `within_s` itself; this is for one that says nothing any more.
            async with (
                asyncio.timeout(order.within_s + MIGRATION_GRACE_S),
                aclosing(cast(Any, client.migrate(command))) as reports,
            ):
                async for report in reports:
                    self.post(MigrationReported(report=report))
        except TimeoutError:
            raise DeadlineExceeded(f"the source of {order.id} did not end it in time") from None


async def _best_effort(call: Awaitable[object], otherwise: str) -> None:
    error = await outcome(call)
    if error is not None:
        log.warning("%s: %s", otherwise, error)


async def outcome(call: Awaitable[object]) -> SllmError | None:
    """Await a call and return its error, if any; what is not ours is logged, and becomes an internal one."""
    try:
        await call
    except SllmError as error:
        return error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        # Not we were cancelled, but the call, because its client was closed.
        return Unavailable("the connection to the agent was given up before it answered")
    except Exception:
        log.exception("a command failed")
        return SllmError("a command failed with an internal error", hint="see the controller's log")
    return None
