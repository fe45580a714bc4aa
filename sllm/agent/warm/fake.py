"""A warm process whose engine hosts are objects: they speak the real wire on loopback, and do as they are told."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sllm.agent.changes import Changes
from sllm.agent.warm.base import HostFds
from sllm.core.launch import Launch, LaunchRecord, WarmReady
from sllm.core.migration import MigrationOrder, MigrationReport, Round
from sllm.core.replica import ReplicaState, StartPhase
from sllm.core.tokens import ClientFrame, StepOutputs
from sllm.errors import EngineFailed, SllmError, StaleGeneration, Unavailable
from sllm.rpc import transport
from sllm.rpc.control import Empty
from sllm.rpc.engine import AttachRequest, HostStatus, RecomputeRequest, StopRequest, handlers

_FIRST_PID = 1 << 30  # beyond any real one


class FakeHost:
    """An engine host: its process, and its EngineService. Its state changes when the test says so.

    It has its grant until it dies, and follows no feed.
    """

    def __init__(self, launch: Launch, pid: int, lease_fd: int, feed: socket.socket) -> None:
        self.launch = launch
        self.feed = feed
        self._lease_fd = lease_fd
        self.stops: list[float] = []
        self.signals: list[signal.Signals] = []
        self.stubborn = False  # does not end when it is told to
        self.attempts = 0  # to attach
        self.orders: list[MigrationOrder] = []
        self.orders_ended = asyncio.Event()
        self.reports: asyncio.Queue[MigrationReport | SllmError | None] = asyncio.Queue()
        self._silent = False
        self._asked = Changes()
        self._pid = pid
        self._status = HostStatus(
            replica=launch.spec.id, state=ReplicaState.STARTING, phase=StartPhase.LOADING, progress=0.0
        )
        self._changes = Changes()
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        return self._pid

    async def ended(self) -> str:
        return await asyncio.shield(self._end)

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)
        if number is signal.SIGKILL or not self.stubborn:
            self.die(f"signal {int(number)}")

    def die(self, how: str) -> None:
        if not self._end.done():
            os.close(self._lease_fd)
            self.feed.close()
            self._end.set_result(how)

    def say(self, **changes: Any) -> None:
        """Change the status that those attached see."""
        self._status = replace(self._status, **changes)
        self._changes.notify()

    def become_ready(self) -> None:
        self.say(state=ReplicaState.READY, phase=StartPhase.READY, progress=1.0)

    def fall_silent(self) -> None:
        """Break the streams of those attached, and answer no other."""
        self._silent = True
        self._changes.notify()

    async def until_asked(self) -> None:
        """Return when somebody has tried to attach since this was called."""
        await self._asked.wait_beyond(self._asked.revision)

    def answer(self) -> None:
        """End the silence, also for those who wait for an answer."""
        self._silent = False
        self._changes.notify()

    async def attach(self, request: AttachRequest) -> AsyncIterator[HostStatus]:
        if request.nonce != self.launch.nonce:
            raise StaleGeneration("another nonce")
        self.attempts += 1
        self._asked.notify()
        while self._silent:
            await self._changes.wait_beyond(self._changes.revision)
        while not self._silent:
            seen = self._changes.revision
            yield self._status
            await self._changes.wait_beyond(seen)
        raise Unavailable("the stream is broken")

    async def stop(self, request: StopRequest) -> Empty:
        self.stops.append(request.drain_s)
        if not self.stubborn and request.drain_s == 0:
            self.die("exit code 0")
        return Empty()

    async def migrate(self, request: MigrationOrder) -> AsyncIterator[MigrationReport]:
        """Report what the test has put into `reports`, until that is an error or None."""
        self.orders.append(request)
        try:
            while (report := await self.reports.get()) is not None:
                if isinstance(report, SllmError):
                    raise report
                yield report
        finally:
            self.orders_ended.set()

    async def recompute(self, request: RecomputeRequest) -> Round:
        return Round(tokens=len(request.token_ids), cached_tokens=0, seconds=0.0)

    async def stream(self, frames: AsyncIterator[ClientFrame]) -> AsyncIterator[StepOutputs]:
        async for _ in frames:
            yield StepOutputs()


class FakeWarm:
    """Forks at once while `about` is set. With `silent` hosts never write their record."""

    def __init__(self) -> None:
        self.about: WarmReady | None = WarmReady(engine="fake", version="1", seconds=0.0)
        self.failure: EngineFailed | None = None
        self.silent = False
        self.hosts: list[FakeHost] = []
        self._servers: list[Any] = []

    async def ready(self) -> WarmReady:
        if self.about is None:
            raise EngineFailed("the warm process ended as it started")
        return self.about

    async def fork(self, launch: Launch, fds: HostFds) -> FakeHost:
        if self.failure is not None:
            raise self.failure
        host = FakeHost(launch, _FIRST_PID + len(self.hosts), os.dup(fds.lease), socket.socket(fileno=os.dup(fds.feed)))
        self.hosts.append(host)
        try:
            server, port = await transport.serve([handlers(host)], "127.0.0.1:0", None)
        except asyncio.CancelledError:
            host.signal(signal.SIGKILL)  # nobody wants it any more
            raise
        self._servers.append(server)
        if not self.silent:
            self._record(host, f"127.0.0.1:{port}")
        return host

    async def close(self) -> None:
        for host in self.hosts:
            host.die("exit code 0")
        for server in self._servers:
            await server.stop(None)

    def _record(self, host: FakeHost, address: str) -> None:
        path = Path(host.launch.record_path)
        record = LaunchRecord(
            replica=host.launch.spec.id,
            nonce=host.launch.nonce,
            pid=host.pid,
            start_ticks=0,
            address=address,
            spec=host.launch.spec,
            save_runtime=host.launch.save_runtime,
        )
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(record.to_json(), encoding="utf-8")
        unfinished.rename(path)
