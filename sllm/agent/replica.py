"""One replica, from the command that starts it until its process is gone. `transitions` decides; this acts."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from sllm.agent.hosts import EngineHost
from sllm.agent.launching import Launcher
from sllm.agent.layouts import Chosen, Layouts
from sllm.agent.transitions import (
    Event,
    Failed,
    HostFound,
    HostReported,
    PhaseBegan,
    StopAsked,
    Tracked,
    step,
)
from sllm.agent.weights import Weights
from sllm.core.device import Device
from sllm.core.launch import LaunchRecord
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus, StartPhase
from sllm.errors import (
    DeadlineExceeded,
    EngineFailed,
    ExecutionFileDamaged,
    InvalidCheckpoint,
    SllmError,
    StaleLayout,
    error_from,
)
from sllm.loader.store import StoredCheckpoint
from sllm.rpc.engine import HostStatus

log = logging.getLogger(__name__)


class Replica:
    """Begin it once, with `start` or `adopt`; `gone` is called when neither process nor work of it is left.

    A failed replica stays, with its reason, until it is told to stop.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        devices: tuple[Device, ...],
        launcher: Launcher,
        weights: Weights,
        layouts: Layouts,
        *,
        priority: Priority,
        on_change: Callable[[], None],
        gone: Callable[[Replica], None],
    ) -> None:
        self.spec = spec
        self.nonce = secrets.token_hex(16)
        self.reported = asyncio.Event()  # the host has spoken
        self._devices = devices
        self._launcher = launcher
        self._weights = weights
        self._layouts = layouts
        self._priority = priority
        self._on_change = on_change
        self._gone = gone
        self._tracked = Tracked(
            status=ReplicaStatus(spec=spec, state=ReplicaState.STARTING, started_at=time.time()),
            phase_since=time.monotonic(),
        )
        self._host: EngineHost | None = None
        self._life: asyncio.Task[None] | None = None
        self._stop: asyncio.Task[None] | None = None
        self._detached = False
        # The limit is on all that comes before it is ready, not on each step.
        self._late_at = asyncio.get_running_loop().time() + self._limit_s
        self._from_runtime = False
        self._save_to = ""
        self._taking_in: asyncio.Task[None] | None = None  # what the host has saved

    @property
    def status(self) -> ReplicaStatus:
        return self._tracked.status

    @property
    def over(self) -> bool:
        """True once nothing of it runs any more."""
        return self._life is not None and self._life.done()

    @property
    def host(self) -> EngineHost | None:
        """Its engine host, from when it listens until nothing of the replica runs any more."""
        return None if self.over else self._host

    def start(self, entry: StoredCheckpoint) -> None:
        """Begin: get a grant of the weights, fork, let the host load and build."""
        self._begin(lambda: self._started(entry))

    def adopt(self, host: EngineHost, record: LaunchRecord) -> None:
        """Begin with a host that lives already."""
        self.nonce = record.nonce
        self._save_to = record.save_runtime
        self._apply(PhaseBegan(phase=StartPhase.BUILDING))
        self._begin(lambda: self._served(host))

    def raise_to(self, priority: Priority) -> None:
        """Let its load go by this priority from now on, if it had a worse one."""
        if priority < self._priority and self.status.state is ReplicaState.STARTING:
            self._priority = priority
            self._weights.raise_to(self.spec.digest, priority)

    def stop(self, drain_s: float) -> None:
        """End it: what serves gets `drain_s` for its requests, what is still starting is called off."""
        was = self.status.state
        self._apply(StopAsked(drain_s=drain_s))
        if was is ReplicaState.STARTING and self._life is not None:
            self._life.cancel()
        elif was is not ReplicaState.FAILED and self._host is not None:
            if self._stop is not None:
                self._stop.cancel()
            self._stop = asyncio.create_task(self._host.stop(drain_s))

    async def detach(self) -> None:
        """Leave the host running and forget it: the agent goes, and may find it again."""
        self._detached = True
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])

    async def ended(self) -> None:
        if self._life is not None:
            await asyncio.wait([self._life])

    def _apply(self, event: Event) -> None:
        before = self._tracked
        self._tracked = step(before, event, time.monotonic(), wall=time.time())
        if self._tracked != before:
            self._on_change()

    def _begin(self, life: Callable[[], Awaitable[None]]) -> None:
        self._life = asyncio.create_task(self._guarded(life), name=self.spec.id)
        # Not in the task itself: one that is cancelled before its first step runs nothing at all.
        self._life.add_done_callback(self._on_end)

    def _on_end(self, _: asyncio.Task[None]) -> None:
        self.reported.set()  # there is nothing more to wait for
        if self._stop is not None:
            self._stop.cancel()
        if not self._detached:
            self._gone(self)

    async def _guarded(self, life: Callable[[], Awaitable[None]]) -> None:
        try:
            await life()
        except asyncio.CancelledError:
            pass  # told to stop, or detached
        except SllmError as error:
            log.warning("replica %s failed: %s", self.spec.id, error)
            self._apply(Failed(error=error))
        except Exception as error:
            log.exception("replica %s failed by a defect of the agent", self.spec.id)
            self._apply(Failed(error=SllmError(f"the agent failed to run it: {type(error).__name__}: {error}")))

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[asyncio.Timeout]:
        """Give a step of the start what is left of the limit. Raises EngineFailed, for weights DeadlineExceeded."""
        limit = asyncio.timeout_at(self._late_at)
        try:
            async with limit:
                yield limit
        except TimeoutError as error:
            if not limit.expired():
                raise
            phase = self.status.phase
            late = DeadlineExceeded if phase is StartPhase.QUEUED else EngineFailed
            raise late(f"the engine was not ready within {self._limit_s:g} s: still {phase.value}") from error

    async def _started(self, entry: StoredCheckpoint) -> None:
        """Run it from the layout that suits it best; from the original if that one turns out to be of no use."""
        async with self._in_time():
            chosen = await self._layouts.choose(entry, self.spec, self._devices)
        try:
            await self._run(entry, chosen)
        except (StaleLayout, InvalidCheckpoint) as error:
            if not chosen.is_runtime or isinstance(error, ExecutionFileDamaged):  # those are the checkpoint's
                raise
            await self._layouts.drop(chosen, error)
            self._launcher.records.remove(self.spec.id)  # the dead host's
            await self._run(entry, self._layouts.original(entry))

    async def _run(self, entry: StoredCheckpoint, chosen: Chosen) -> None:
        self._from_runtime, self._save_to = chosen.is_runtime, chosen.save_to
        checking = asyncio.create_task(self._layouts.check_execution_files(entry))  # while the load waits for its turn
        checking.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, also when nobody waits
        try:
            async with self._in_time():
                host = await self._forked(chosen, checking)
            await self._served(host)
        finally:
            checking.cancel()
            self._layouts.given_up(chosen)

    async def _forked(self, chosen: Chosen, checking: asyncio.Task[None]) -> EngineHost:
        """Return a host with a grant of its own, which lasts as long as the host does; forked after `checking`.

        Raises DeadlineExceeded if the load's turn does not come in time, and what `checking` does.
        """
        wish = self._weights.granted(chosen.stored, priority=self._priority, deadline_s=self._left_s)
        async with wish as granted:
            await checking
            self._apply(PhaseBegan(phase=StartPhase.FORKING))
            host = await self._launcher.launch(self.spec, self.nonce, self._devices, chosen, granted)
        log.info("replica %s of %s is process %d", self.spec.id, self.spec.deployment, host.process.pid)
        return host

    async def _served(self, host: EngineHost) -> None:
        """Stay with the host until it is gone, or has failed; leave none behind."""
        self._host = host
        self._apply(HostFound(address=host.client.address, pid=host.process.pid))
        ended = asyncio.create_task(host.process.ended())
        following = asyncio.create_task(self._follow(host))
        try:
            await asyncio.wait({ended, following}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                self._apply(Failed(error=self._launcher.died(self.spec.id, ended.result())))
            else:
                following.result()
        finally:
            following.cancel()
            ended.cancel()
            if not self._detached:
                await host.kill()
            await host.client.close()

    async def _follow(self, host: EngineHost) -> None:
        """Take over what the host says, until it says that it has failed."""
        async with self._in_time() as limit, aclosing(host.statuses()) as statuses:
            async for status in statuses:
                self._check_layout(status)
                self._apply(HostReported(status=status))
                self.reported.set()
                self._take_saved(status)
                if self.status.state is ReplicaState.FAILED:
                    return
                if self.status.state is not ReplicaState.STARTING:
                    limit.reschedule(None)

    def _check_layout(self, status: HostStatus) -> None:
        """Raise the failure of a start from a runtime layout that another start, from the original, would not have."""
        if self._from_runtime and status.state is ReplicaState.FAILED and self.status.state is ReplicaState.STARTING:
            error = error_from(status.error_reason, status.error)
            if isinstance(error, (StaleLayout, InvalidCheckpoint)):
                raise error

    def _take_saved(self, status: HostStatus) -> None:
        if status.runtime_saved and self._save_to and self._taking_in is None:
            self._taking_in = asyncio.create_task(self._layouts.saved(Path(self._save_to)))

    @property
    def _limit_s(self) -> float:
        return self._launcher.config.engine.start_timeout_s

    @property
    def _left_s(self) -> float:
        """What is left of the limit; never 0, which would mean that there is none."""
        return max(0.001, self._late_at - asyncio.get_running_loop().time())
