"""The engine host: serves one replica to its agent (attach, stop, migrate), to gateways (token streams) and to other
engine hosts (recompute).

Its states: STARTING -> READY -> DRAINING -> STOPPING, and FAILED from any of the first three. It ends when it is told
to, or when no agent has been attached for the grace period; a failed one waits for either, so that its reason is read.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from sllm.core.ids import RequestId
from sllm.core.launch import Launch
from sllm.core.migration import MigrationOrder, MigrationReport, Round
from sllm.core.replica import ReplicaState, StartPhase
from sllm.core.tokens import (
    PROTOCOL_VERSION,
    AbortRequests,
    ClientFrame,
    Finish,
    FinishReason,
    OpenStream,
    StepOutputs,
    TokenOutput,
    TokenRequest,
)
from sllm.engine.base import EngineCore, Hooks, Output
from sllm.engine.connection import Connection
from sllm.engine.load import Load
from sllm.engine.migrating import Migrations, Place
from sllm.engine.recomputes import Recomputes
from sllm.engine.requests import Requests
from sllm.engine.sizes import oversized
from sllm.engine.starting import Starting
from sllm.engine.status import StatusBoard
from sllm.engine.thread import EngineThread
from sllm.engine.watchdog import Watchdog
from sllm.errors import EngineFailed, InvalidArgument, NotFound, SllmError, StaleGeneration, Unavailable
from sllm.rpc.control import Empty
from sllm.rpc.engine import AttachRequest, EngineClient, HostStatus, RecomputeRequest, StopRequest
from sllm.rpc.transport import Tls

log = logging.getLogger(__name__)


class Host:
    """Make it in a running event loop. `finished` is set when the process should end.

    `memory_bytes` measures what this replica holds; `tls` is for calls to other hosts. The load is told at most once in
    `load_every_s`; every `beat_s` gateways get a sign of life, and the engine is looked after.
    """

    def __init__(
        self,
        launch: Launch,
        build: Callable[[Hooks], EngineCore],
        *,
        memory_bytes: Callable[[], int],
        tls: Tls | None = None,
        load_every_s: float = 1.0,
        beat_s: float = 1.0,
    ) -> None:
        self._launch = launch
        self._memory_bytes = memory_bytes
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(build, self)
        new_key = functools.partial(next, itertools.count(1))
        self._requests = Requests(new_key, self._request_ended)
        self._recomputes = Recomputes(self._thread, new_key)
        place = Place(
            requests=self._requests,
            thread=self._thread,
            dial=lambda address: EngineClient(address, tls, peer="the engine host"),
            left=self._load_changed,
        )
        self._migrations = Migrations(place)
        self._watchdog = Watchdog(launch.stall_s, beat_s)
        self._beat_s = beat_s
        complete = launch.grant.ready_chunks >= launch.grant.chunks
        first = StartPhase.BUILDING if complete else StartPhase.LOADING
        self._board = StatusBoard(HostStatus(replica=launch.spec.id, state=ReplicaState.STARTING, phase=first))
        self._starting = Starting(self._board)
        self._load = Load(self._board, self._measured, load_every_s)
        self._attached = 0
        self._grace: asyncio.TimerHandle | None = None
        self._drain: asyncio.TimerHandle | None = None
        self._pulse: asyncio.TimerHandle | None = None
        self._failure: EngineFailed | None = None
        self.finished = asyncio.Event()

    @property
    def status(self) -> HostStatus:
        return self._board.status

    def start(self) -> None:
        """Begin to build the engine, and to count the grace: nobody is attached yet."""
        self._starting.begin()
        self._await_agent()
        self._thread.start()

    async def close(self, wait_s: float) -> None:
        """Stop the engine. A build that is under way cannot be interrupted: it is left behind after `wait_s`."""
        self._thread.stop()
        try:
            async with asyncio.timeout(wait_s):
                await self._thread.ended.wait()
        except TimeoutError:
            log.warning("the engine did not stop within %s s", wait_s)

    # --- the agent -------------------------------------------------------------------------

    async def attach(self, request: AttachRequest) -> AsyncIterator[HostStatus]:
        """Yield the status now and at every change. While one such stream is open, the grace does not run."""
        if not hmac.compare_digest(request.nonce.encode(), self._launch.nonce.encode()):
            raise StaleGeneration(f"{self._launch.spec.id} was started with another nonce")
        self._attached += 1
        if self._grace is not None:
            self._grace.cancel()
        try:
            async for status in self._board.follow():
                yield status
        finally:
            self._attached -= 1
            if self._attached == 0 and not self.finished.is_set():
                self._await_agent()

    def _await_agent(self) -> None:
        self._grace = self._loop.call_later(self._launch.grace_s, self._give_up)

    def _give_up(self) -> None:
        log.warning("no agent for %s s: ending", self._launch.grace_s)
        self._finish()

    async def stop(self, request: StopRequest) -> Empty:
        """Refuse new requests, give running ones up to `drain_s`, then end."""
        self.drain(request.drain_s)
        return Empty()

    def drain(self, drain_s: float) -> None:
        """As `stop`. Called again, it can only make the end come sooner."""
        if self.status.state is ReplicaState.READY:
            self._board.update(state=ReplicaState.DRAINING)
            self._recomputes.close(self._away())
        if drain_s <= 0 or self.status.state is not ReplicaState.DRAINING or not self._requests:
            self._finish()
            return
        ends_at = self._loop.time() + drain_s
        if self._drain is None or ends_at < self._drain.when():
            if self._drain is not None:
                self._drain.cancel()
            self._drain = self._loop.call_at(ends_at, self._finish)

    def _finish(self) -> None:
        if self.finished.is_set():
            return
        stopping = Unavailable(f"{self._launch.spec.id} is stopping")
        self._migrations.stop()
        self._thread.abort(self._requests.fail_all(stopping, time.monotonic(), self._thread.steps))
        self._recomputes.close(stopping)
        self._requests.close_all()
        self._board.update(state=ReplicaState.STOPPING, running=0, waiting=0)
        self._board.close()
        self._load.stop()
        for timer in (self._grace, self._drain, self._pulse):
            if timer is not None:
                timer.cancel()
        self.finished.set()

    # --- gateways --------------------------------------------------------------------------

    async def stream(self, frames: AsyncIterator[ClientFrame]) -> AsyncIterator[StepOutputs]:
        """Speak the token protocol with one gateway until either side ends it; then abort what is left."""
        connection = self._requests.connect(self._admit(await anext(frames, None)))
        reader = asyncio.create_task(self._read(frames, connection))
        try:
            async for step in connection.steps():
                yield step
        finally:
            reader.cancel()
            self._thread.abort(self._requests.disconnect(connection))
            self._load_changed()

    def _admit(self, opening: ClientFrame | None) -> str:
        if not isinstance(opening, OpenStream):
            raise InvalidArgument("a token stream must begin by opening itself")
        if opening.protocol_version != PROTOCOL_VERSION:
            raise InvalidArgument(
                f"gateway {opening.gateway!r} speaks token protocol {opening.protocol_version}, "
                f"this engine host speaks {PROTOCOL_VERSION}"
            )
        self._check_generation(opening.generation)
        return opening.gateway

    def _check_generation(self, generation: int) -> None:
        spec = self._launch.spec
        if generation != spec.generation:
            raise StaleGeneration(f"{spec.id} has generation {spec.generation}, not {generation}")

    async def _read(self, frames: AsyncIterator[ClientFrame], connection: Connection) -> None:
        try:
            async for frame in frames:
                self._take(frame, connection)
            connection.close()
        except SllmError as error:
            connection.close(error)
        except Exception:
            log.exception("reading from gateway %r failed", connection.gateway)
            connection.close()

    def _take(self, frame: ClientFrame, connection: Connection) -> None:
        match frame:
            case TokenRequest():
                self._take_request(frame, connection)
            case AbortRequests():
                self._thread.abort(self._requests.drop(connection, frame.stream_ids))
                self._load_changed()
            case OpenStream():
                raise InvalidArgument("a token stream was opened twice")

    def _take_request(self, request: TokenRequest, connection: Connection) -> None:
        refusal = self._refusal() or oversized(request)
        if refusal is None:
            self._recomputes.drop(request.request_id)
            self._thread.add(self._requests.open(connection, request), request)
            self._load_changed()
            return
        output = TokenOutput(
            stream_id=request.stream_id,
            position=request.num_output_tokens,
            token_ids=[],
            finish=Finish(reason=FinishReason.ERROR, error=refusal),
        )
        connection.send(StepOutputs(outputs=[output], timestamp=time.monotonic(), steps=self._thread.steps))

    def _refusal(self) -> Unavailable | None:
        """Why nothing new is taken. After a failure too it is `Unavailable`: what only came late did not die here."""
        if self._failure is not None:
            return Unavailable(f"{self._launch.spec.id} takes no requests any more: {self._failure.message}")
        return None if self.status.state is ReplicaState.READY else self._away()

    def _away(self) -> Unavailable:
        return Unavailable(f"{self._launch.spec.id} is {self.status.state}: it takes no requests")

    # --- migration -------------------------------------------------------------------------

    async def migrate(self, request: MigrationOrder) -> AsyncIterator[MigrationReport]:
        """Carry out an order, also while draining. Raises NotFound, StaleGeneration, EngineFailed, Unavailable."""
        spec = self._launch.spec
        if request.replica != spec.id:
            raise NotFound(f"this is {spec.id}, not {request.replica}")
        self._check_generation(request.generation)
        if self._failure is not None:
            raise self._failure
        if self.status.state not in (ReplicaState.READY, ReplicaState.DRAINING):
            raise Unavailable(f"{spec.id} is {self.status.state}: nothing runs there")
        async with aclosing(self._migrations.run(request)) as reports:
            async for report in reports:
                yield report

    def _request_ended(self, request: RequestId) -> None:
        self._migrations.ended(request)

    async def recompute(self, request: RecomputeRequest) -> Round:
        """Do one round of a migration to this replica.

        Raises StaleGeneration, Unavailable if nothing new is taken, and what `Recomputes.run` does.
        """
        self._check_generation(request.generation)
        refusal = self._refusal()
        if refusal is not None:
            raise refusal
        return await self._recomputes.run(request)

    # --- the engine thread -----------------------------------------------------------------

    def arrived(self, share: float) -> None:
        self._starting.arrived(share)

    def progressed(self, share: float) -> None:
        self._starting.progressed(share)

    def built(self) -> None:
        if self.status.state is ReplicaState.STARTING:
            self._starting.ready(self._memory_bytes())
            self._beat()

    def _beat(self) -> None:
        self._requests.beat(time.monotonic(), self._thread.steps)
        if self._watchdog.hangs(self._thread.working, self._thread.steps):
            self.failed(EngineFailed(f"the engine made no step for {self._launch.stall_s:g} s"))
        if not self.finished.is_set() and self._failure is None:
            self._pulse = self._loop.call_later(self._beat_s, self._beat)

    def saved(self) -> None:
        """Its parameters are on the SSD: the agent may use them for the next start."""
        self._board.update(runtime_saved=True)

    def stepped(self, outputs: list[Output]) -> None:
        outputs = self._recomputes.take(outputs)
        given_up = self._requests.deliver(outputs, time.monotonic(), self._thread.steps)
        if given_up:
            self._thread.abort(given_up)
        self._migrations.stepped()
        if given_up or any(output.finish for output in outputs):
            self._load_changed()

    def failed(self, error: SllmError) -> None:
        """The engine did not come up, broke or hangs. Wait to be told to end: the agent wants to know why."""
        if self._failure is not None:
            return  # one that hung, and broke later
        self._failure = EngineFailed(error.message, hint=error.hint)
        self._requests.fail_all(self._failure, time.monotonic(), self._thread.steps)
        self._recomputes.close(self._failure)
        if not self.finished.is_set():
            draining = self.status.state is ReplicaState.DRAINING
            self._board.update(state=ReplicaState.FAILED, error=error.message, error_reason=error.reason)
            self._load_changed()
            if draining:
                self._finish()

    # --- load ------------------------------------------------------------------------------

    def _load_changed(self) -> None:
        """Publish the load. The last request of a drain ends it."""
        if self.status.state is ReplicaState.DRAINING and not self._requests:
            self._finish()
        self._load.changed()

    def _measured(self) -> dict[str, Any]:
        open_requests, capacity = len(self._requests), self._launch.spec.capacity
        return {
            "running": min(open_requests, capacity),
            "waiting": max(0, open_requests - capacity),
            "memory_bytes": self._memory_bytes(),
        }
