"""Flights: migration orders that are under way, and how each job's requests have fared. Pure bookkeeping, in memory.

What is lost at a restart is known from what still runs where: an order ends with the controller that gave it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm.core.ids import MigrationId, OperationId, ReplicaId, RequestId
from sllm.core.migration import OVER, MigrationOrder, MigrationReport, MigrationState
from sllm.errors import DeadlineExceeded, QueueFull, SllmError, error_from

# After an order that did not bring all away: the gateways' next reports say what there still is to move.
REST_S = 1.0
# These say nothing against a destination: it had many rounds to compute, or the order's time came to its end in one.
_PASSING = (QueueFull, DeadlineExceeded)


@dataclass(slots=True, kw_only=True)
class Flight:
    """An order that an agent has, and the last report on each of its requests."""

    order: MigrationOrder
    job: OperationId
    reports: dict[RequestId, MigrationReport] = field(default_factory=dict)

    def open(self) -> list[RequestId]:
        """What has neither moved nor been given up."""
        return [r for r in self.order.requests if r not in self.reports or self.reports[r].state not in OVER]


@dataclass(slots=True, kw_only=True)
class Tally:
    """What a job has seen of its requests. `tried` are destinations at which a migration failed, but for what passes;
    `errors` the last error of each such request; `refused` are orders in a row that a source's agent did not carry out.
    `rounds` and `sent_bytes` are those of what has moved."""

    seen: set[RequestId] = field(default_factory=set)
    moved: set[RequestId] = field(default_factory=set)
    finished: set[RequestId] = field(default_factory=set)
    tried: dict[RequestId, tuple[ReplicaId, ...]] = field(default_factory=dict)
    errors: dict[RequestId, SllmError] = field(default_factory=dict)
    refused: int = 0
    refusal: SllmError | None = None
    started: bool = False
    rounds: int = 0
    sent_bytes: int = 0


class Flights:
    def __init__(self) -> None:
        self._flights: dict[MigrationId, Flight] = {}
        self._tallies: dict[OperationId, Tally] = {}
        self._rests: dict[ReplicaId, float] = {}

    def tally(self, job: OperationId) -> Tally:
        return self._tallies.setdefault(job, Tally())

    def begin(self, order: MigrationOrder, job: OperationId) -> None:
        self._flights[order.id] = Flight(order=order, job=job)

    def report(self, report: MigrationReport) -> Flight | None:
        """Note how far a request has come; None if nobody waits for that any more."""
        flight = self._flights.get(report.migration)
        if flight is None:
            return None
        flight.reports[report.request] = report
        tally = self.tally(flight.job)
        if report.state is MigrationState.MOVED:
            tally.moved.add(report.request)
            tally.rounds += report.rounds
            tally.sent_bytes += report.sent_bytes
        elif report.state is MigrationState.FINISHED:
            tally.finished.add(report.request)
        elif report.state is MigrationState.FAILED:
            error = tally.errors[report.request] = error_from(report.error_reason, report.error)
            if not isinstance(error, _PASSING):
                tally.tried[report.request] = (*tally.tried.get(report.request, ()), flight.order.target.replica)
        return flight

    def end(self, migration: MigrationId, error: SllmError | None, now: float) -> None:
        """An order is over; its source rests if something may still be there."""
        flight = self._flights.pop(migration, None)
        if flight is None:
            return
        tally = self.tally(flight.job)
        tally.refused = tally.refused + 1 if error else 0
        tally.refusal = error
        # What has just ended is named by its gateway until its next report.
        if any(request not in tally.moved for request in flight.order.requests):
            self._rests[flight.order.replica] = now + REST_S

    def drop(self, job: OperationId) -> list[MigrationId]:
        """Forget a job that has ended, and return its orders, which are to be cancelled."""
        self._tallies.pop(job, None)
        found = [migration for migration, flight in self._flights.items() if flight.job == job]
        for migration in found:
            del self._flights[migration]
        return found

    def moving(self) -> dict[RequestId, ReplicaId]:
        """Where each request of an order goes that is still at its source."""
        return {request: flight.order.target.replica for flight in self._flights.values() for request in flight.open()}

    def busy(self, now: float) -> frozenset[ReplicaId]:
        """Sources that have an order, or rest after one."""
        self._rests = {replica: until for replica, until in self._rests.items() if now < until}
        return frozenset(self._rests) | {flight.order.replica for flight in self._flights.values()}

    def next_rest_over(self) -> float | None:
        return min(self._rests.values(), default=None)
