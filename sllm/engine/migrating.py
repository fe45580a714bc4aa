"""At the source of migrations: carries out its agent's orders (paper §5).

`sllm.migration` decides (rounds, handover, who waits); this feeds it what happens and does what it says. All of it is
in the event loop, so that a handover is one piece: nothing comes of a request here once its gateway has been told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from sllm.core.ids import RequestId
from sllm.core.migration import OVER, MigrationOrder, MigrationReport, MigrationState
from sllm.engine.requests import Requests
from sllm.engine.rounds import ask, progress_of, round_of, wire_bytes
from sllm.engine.thread import EngineThread
from sllm.errors import SllmError
from sllm.failpoints import failpoint
from sllm.migration import coordinator, source
from sllm.migration.policy import Progress
from sllm.migration.source import (
    Advanced,
    Begin,
    CalledOff,
    HandOver,
    Phase,
    Recompute,
    Report,
    RequestEnded,
    RoundEnded,
    RoundFailed,
    Source,
    StopRecompute,
    TimeOver,
    Waited,
    Watch,
)
from sllm.rpc.engine import EngineClient, RecomputeRequest

log = logging.getLogger(__name__)

_NOTHING = Progress(prompt_tokens=0, output_tokens=0, interval_s=0.0)
_CALLED_OFF = CalledOff()
_SOON_S = 0.001  # for a call without time: 0 would mean that it has as much as it likes


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What orders work on: the requests of one engine host and its engine. `left` is called after each handover."""

    requests: Requests
    thread: EngineThread
    dial: Callable[[str], EngineClient]
    left: Callable[[], None]


class Migrations:
    """The orders that are being carried out."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._orders: set[_Order] = set()

    async def run(self, order: MigrationOrder) -> AsyncGenerator[MigrationReport, None]:
        """Yield each change of each request's migration; leaving early cancels what has not been handed over."""
        failpoint("migrate-begin")
        client = self._place.dial(order.target.address)
        running = _Order(order, self._place, client)
        self._orders.add(running)
        try:
            running.begin()
            while (report := await running.reports.get()) is not None:
                yield report
        finally:
            running.end(_CALLED_OFF)
            self._orders.discard(running)
            await client.close()

    def ended(self, request: RequestId) -> None:
        """Nothing of a request is open here any more."""
        for order in self._orders:
            order.post(request, RequestEnded())

    def stepped(self) -> None:
        """An engine step has been sent to the gateways."""
        for order in self._orders:
            order.stepped()

    def stop(self) -> None:
        """Leave everything where it is: this replica stops."""
        for order in self._orders:
            order.end(_CALLED_OFF)


@dataclass(slots=True)
class _Move:
    """One request of an order. `progress` is the last that was known; `watch` ends the wait for more of it."""

    state: Source
    progress: Progress = _NOTHING
    round: asyncio.Task[None] | None = None
    watch: asyncio.TimerHandle | None = None
    sent_bytes: int = 0
    predicted_pause_s: float | None = None


class _Order:
    """One order. `reports` ends with None."""

    def __init__(self, order: MigrationOrder, place: Place, client: EngineClient) -> None:
        self.reports: asyncio.Queue[MigrationReport | None] = asyncio.Queue()
        self._order = order
        self._place = place
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._cost = order.cost
        self._deadline = self._loop.time() + order.within_s
        requests = order.requests or place.requests.ids
        self._coordinator = coordinator.new(requests, concurrency=order.concurrency)
        self._moves = {request: _Move(self._fresh()) for request in requests}
        self._events: deque[tuple[RequestId, source.Event]] = deque()
        self._busy = False
        self._over = False
        self._timer = self._loop.call_at(self._deadline, self.end, TimeOver())

    def begin(self) -> None:
        self._coordinate(coordinator.Opened())
        for request in self._coordinator.waiting:
            self._report(request, Report(state=MigrationState.QUEUED))
        self._work()

    def end(self, event: CalledOff | TimeOver) -> None:
        """Leave where they are all that have not moved."""
        self._coordinate(coordinator.Stopped(), event)
        self._work()

    def post(self, request: RequestId, event: source.Event) -> None:
        if request in self._moves:
            self._events.append((request, event))
            self._work()

    def stepped(self) -> None:
        """What waits for tokens may have got them."""
        for request, move in self._moves.items():
            if move.watch is not None:
                self.post(request, Advanced(progress=self._progress(request)))

    def _waited(self, request: RequestId) -> None:
        self.post(request, Waited(progress=self._progress(request)))

    def _work(self) -> None:
        """Deal with events, one after the other: what one causes comes after it, not within it."""
        if self._busy or self._over:
            return
        self._busy = True
        try:
            while self._events:
                self._step(*self._events.popleft())
        finally:
            self._busy = False
        if self._coordinator.is_over:
            self._over = True
            self._timer.cancel()
            self.reports.put_nowait(None)

    def _step(self, request: RequestId, event: source.Event) -> None:
        move = self._moves[request]
        before = move.state.phase
        move.state, effects = source.step(move.state, event, self._loop.time())
        if move.state.phase is not before:
            self._unwatch(move)
        for effect in effects:
            self._do(request, move, effect)
        if move.state.phase is Phase.OVER and before is not Phase.OVER:
            self._coordinate(coordinator.Over(request=request))

    def _coordinate(self, event: coordinator.Event, why: CalledOff | TimeOver = _CALLED_OFF) -> None:
        self._coordinator, effects = coordinator.step(self._coordinator, event)
        for effect in effects:
            match effect:
                case coordinator.Start(request=request):
                    self._moves[request].state = self._fresh()
                    self._events.append((request, self._beginning(request)))
                case coordinator.CallOff(request=request):
                    self._events.append((request, why))

    def _fresh(self) -> Source:
        """Return a request's state before its turn; what the rounds of others have cost is known by then."""
        return source.new(cost=self._cost, block_size=self._place.thread.block_size, deadline=self._deadline)

    def _beginning(self, request: RequestId) -> source.Event:
        if not self._place.requests.sequences(request):
            return RequestEnded()
        return Begin(progress=self._progress(request))

    def _progress(self, request: RequestId) -> Progress:
        move, sequences = self._moves[request], self._place.requests.sequences(request)
        if sequences:
            move.progress = progress_of(sequences)
        return move.progress

    # --- effects ---------------------------------------------------------------------------

    def _do(self, request: RequestId, move: _Move, effect: source.Effect) -> None:
        match effect:
            case Recompute():
                asked = round_of(self._place.requests.sequences(request), self._order.target.generation)
                move.sent_bytes += wire_bytes(asked)
                move.round = asyncio.create_task(self._round(request, asked))
            case StopRecompute():
                if move.round is not None:
                    move.round.cancel()
            case Watch(until=until):
                move.watch = self._loop.call_at(until, self._waited, request)
            case HandOver():
                move.predicted_pause_s = effect.predicted_pause_s
                self._hand_over(request)
            case Report():
                self._report(request, effect)

    def _unwatch(self, move: _Move) -> None:
        if move.watch is not None:
            move.watch.cancel()
            move.watch = None

    async def _round(self, request: RequestId, asked: tuple[RecomputeRequest, ...]) -> None:
        event: source.Event
        try:
            answered = await ask(self._client, asked, max(_SOON_S, self._deadline - self._loop.time()))
            event = RoundEnded(
                round=answered.round, progress=self._progress(request), round_trip_s=answered.round_trip_s
            )
        except SllmError as error:
            # A call ends with the order's time: that is nobody's failure.
            event = RoundFailed(error=error) if self._loop.time() < self._deadline else TimeOver()
        except Exception:
            log.exception("a round of %s failed", request)
            event = RoundFailed(error=SllmError("the round failed"))
        self.post(request, event)
        self._cost = self._moves[request].state.road.cost

    def _hand_over(self, request: RequestId) -> None:
        place = self._place
        self._progress(request)
        failpoint("before-handover")
        keys = place.requests.hand_over(request, self._order.target, time.monotonic(), place.thread.steps)
        place.thread.abort(keys)
        failpoint("after-handover")
        place.left()

    def _report(self, request: RequestId, report: Report) -> None:
        move, error = self._moves[request], report.error
        self._progress(request)
        told = MigrationReport(
            migration=self._order.id,
            request=request,
            state=report.state,
            rounds=move.state.rounds,
            prompt_tokens=move.progress.prompt_tokens,
            output_tokens=move.progress.output_tokens,
            sent_bytes=move.sent_bytes,
            last_round=report.last_round,
            predicted_pause_s=move.predicted_pause_s,
            error="" if error is None else error.message,
            error_reason="" if error is None else error.reason,
        )
        self.reports.put_nowait(told)
        if told.state in OVER:
            where = self._order.target.replica
            log.info(
                "%s: %s to %s: %s, %d rounds %s", told.migration, request, where, told.state, told.rounds, told.error
            )
