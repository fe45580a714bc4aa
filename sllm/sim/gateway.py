"""Gateway: holds simulated requests and sends them to ready replicas with room, as gateways and the controller do.

First come first served per deployment; a request that has lost its replica goes before those that had none yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sllm.core.ids import DeploymentName, ReplicaId
from sllm.core.migration import Outlook
from sllm.core.snapshot import Held
from sllm.core.table import Table
from sllm.migration.length import LengthsOfAll
from sllm.migration.outlook import outlook
from sllm.sim.events import EventQueue
from sllm.sim.replica import Replica
from sllm.sim.request import Outcome, Request
from sllm.sim.spec import ModelSpec


@dataclass(slots=True)
class _Line:
    """Held requests of one deployment, in order; `lost` have had a replica."""

    lost: dict[int, Request] = field(default_factory=dict)
    new: dict[int, Request] = field(default_factory=dict)

    def of(self, request: Request) -> dict[int, Request]:
        return self.lost if request.losses else self.new

    def first(self) -> Request | None:
        return next(iter(self.lost.values()), None) or next(iter(self.new.values()), None)

    def __len__(self) -> int:
        return len(self.lost) + len(self.new)


class Gateway:
    """`held` and `loads` are what the controller hears of it, always as they are now. `on_touched` is told of a
    deployment whose requests have come, gone or moved, `on_ended` of each request that is over and of its replica."""

    def __init__(
        self,
        events: EventQueue,
        models: Iterable[ModelSpec],
        *,
        timeout_s: float,
        queue_length: int,
        on_touched: Callable[[DeploymentName], None],
        on_ended: Callable[[Request, Replica | None], None],
    ) -> None:
        self.held: Table[DeploymentName, Held] = Table()
        self.loads: Table[ReplicaId, int] = Table()
        self._events = events
        self._models = {model.deployment.name: model for model in models}
        self._timeout_s = timeout_s
        self._queue_length = queue_length
        self._on_touched = on_touched
        self._on_ended = on_ended
        self._lines = {name: _Line() for name in self._models}
        self._lengths = LengthsOfAll()
        self._targets: dict[DeploymentName, dict[ReplicaId, Replica]] = {name: {} for name in self._models}

    # -- routes

    def open(self, replica: Replica) -> None:
        """It is ready: send it requests."""
        self._targets[replica.spec.deployment][replica.spec.id] = replica
        self.offer(replica.spec.deployment)

    def close(self, replica: ReplicaId, deployment: DeploymentName) -> None:
        """Send it nothing new."""
        self._targets[deployment].pop(replica, None)

    # -- requests

    def arrive(self, request: Request) -> None:
        request.held_at = self._events.now
        name = request.arrival.deployment
        if len(self._lines[name]) >= self._queue_length:
            self._end(request, Outcome.REFUSED, None)
            return
        self._hold(request)
        self.offer(name)

    def offer(self, name: DeploymentName) -> None:
        """Send held requests, in order, to the least loaded replica that has room."""
        line, targets = self._lines[name], self._targets[name]
        while targets and (request := line.first()):
            best = min(targets.values(), key=lambda r: (len(r.running) / r.spec.capacity, r.spec.id))
            if len(best.running) >= best.spec.capacity:
                break
            del line.of(request)[request.number]
            self._run(request, best)
        self._tell(name)

    def lose(self, requests: Sequence[Request]) -> None:
        """Their replica has been ended under them: they go on elsewhere."""
        now = self._events.now
        for request in requests:
            self._forget(request)
            request.interrupt(self._models[request.arrival.deployment].timing, now)
            request.held_at = now
            self._hold(request)
        for name in dict.fromkeys(request.arrival.deployment for request in requests):
            self.offer(name)

    def fall_silent(self, replica: Replica) -> None:
        """Its node is gone: its requests get no further. That they notice later."""
        replica.silent = True
        for request in replica.running.values():
            request.interrupt(replica.model.timing, self._events.now)
            request.held_at = self._events.now

    def notice(self, replica: Replica) -> None:
        """What runs on a replica that fell silent goes on elsewhere."""
        self.close(replica.spec.id, replica.spec.deployment)
        self.loads.pop(replica.spec.id, None)
        for request in replica.running.values():
            if request.replica is not None:  # it was sent there when nobody knew
                request.held_at = request.granted_at
                request.interrupt(replica.model.timing, request.granted_at)
            self._hold(request)
        replica.running.clear()
        self.offer(replica.spec.deployment)

    # -- moving

    def outlook(self, request: Request) -> Outlook:
        """What is expected of one that runs, from how long others of its deployment were."""
        timing = self._models[request.arrival.deployment].timing
        progress = request.progress(timing, self._events.now)
        left = self._lengths.left(request.arrival.deployment, progress.output_tokens, 0)
        return outlook(progress, timing.recompute_cost, left_tokens=left, moves=request.moves)

    def hand_over(self, request: Request, target: Replica, pause_s: float) -> None:
        """Let it go on at another replica, which has room."""
        self._forget(request)
        end_at = request.move(target, target.model.timing, self._events.now, pause_s)
        self._enter(request, target, end_at)
        self._on_touched(request.arrival.deployment)

    def _hold(self, request: Request) -> None:
        """Put it in its line. It is given up when its time is over, counted from now."""
        name = request.arrival.deployment
        self._lines[name].of(request)[request.number] = request
        self._events.at(self._events.now + self._timeout_s, self._expired, request, request.attempt)

    def _run(self, request: Request, replica: Replica) -> None:
        self._enter(request, replica, request.begin(replica, replica.model.timing, self._events.now))

    def _enter(self, request: Request, replica: Replica, end_at: float) -> None:
        replica.running[request.number] = request
        self.loads[replica.spec.id] = len(replica.running)
        if not replica.silent:
            self._events.at(end_at, self._finished, request, request.attempt)

    def _forget(self, request: Request) -> None:
        """It runs no more where it ran."""
        replica = request.replica
        assert replica is not None
        left = self.loads[replica.spec.id] - 1
        if left:
            self.loads[replica.spec.id] = left
        else:
            del self.loads[replica.spec.id]

    def _finished(self, request: Request, attempt: int) -> None:
        if attempt != request.attempt:
            return  # it lost its replica
        replica = request.replica
        self._forget(request)
        request.replica = None
        self._lengths.finished(request.arrival.deployment, request.arrival.output_tokens)
        self._end(request, Outcome.SERVED, replica)
        self.offer(request.arrival.deployment)

    def _expired(self, request: Request, attempt: int) -> None:
        if attempt != request.attempt or request.outcome is not None:
            return  # it was granted a replica
        del self._lines[request.arrival.deployment].of(request)[request.number]
        request.waited_s += self._events.now - request.held_at
        self._end(request, Outcome.TIMED_OUT, None)
        self._tell(request.arrival.deployment)

    def _end(self, request: Request, outcome: Outcome, replica: Replica | None) -> None:
        request.outcome = outcome
        request.attempt += 1
        self._on_ended(request, replica)
        self._on_touched(request.arrival.deployment)

    def _tell(self, name: DeploymentName) -> None:
        line = self._lines[name]
        firsts = [next(iter(part.values())).held_at for part in (line.lost, line.new) if part]
        if firsts:
            self.held[name] = Held(count=len(line), since=min(firsts))
        else:
            self.held.pop(name, None)
        self._on_touched(name)
