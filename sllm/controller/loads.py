"""Loads: how many requests each replica has, from what gateways report and what was granted since. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from sllm.core.ids import DeploymentName, ReplicaId, RequestId
from sllm.core.request import RequestRow, RequestState

OVERDUE_S = 5.0  # gateways report every second
FORGOTTEN_S = 60.0
# A report may have been under way when a grant was made; the second one after it knows.
_REPORTS_TO_CONFIRM = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gateway:
    rows: tuple[RequestRow, ...]
    running: Counter[ReplicaId]
    seen_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Granted:
    gateway: str
    row: RequestRow
    at: float
    # Since it was granted, per process of that gateway's name.
    reports: Counter[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moved:
    target: ReplicaId
    # Of the request's gateway, since it was handed over.
    reports: int


class Loads:
    def __init__(self) -> None:
        self._moved: dict[RequestId, _Moved] = {}
        # By name and incarnation: two processes may have been given one name.
        self._gateways: dict[tuple[str, str], _Gateway] = {}
        self._granted: dict[int, _Granted] = {}
        # Open route watches, by name; 0 once all have been closed.
        self._watches: dict[str, int] = {}

    def report(
        self, gateway: str, incarnation: str, rows: tuple[RequestRow, ...], now: float
    ) -> tuple[RequestRow, ...]:
        """Take a gateway's whole report; what is not in it is over: return these as they were last heard of."""
        before = self._gateways.get((gateway, incarnation))
        named = {row.id for row in rows}
        over = tuple(row for row in before.rows if row.id not in named) if before else ()
        rows = tuple(self._placed(row) for row in rows)
        for row in over:
            self._moved.pop(row.id, None)
        self._gateways[gateway, incarnation] = _Gateway(rows=rows, running=_counted(rows), seen_at=now)
        confirmed = {row.id for row in rows if row.state is RequestState.RUNNING}
        for ticket, granted in list(self._granted.items()):
            if granted.gateway == gateway:
                self._age(ticket, granted, incarnation, seen=granted.row.id in confirmed)
        return over

    def news(
        self, gateway: str, incarnation: str, rows: tuple[RequestRow, ...], finished: Mapping[str, int]
    ) -> Counter[DeploymentName]:
        """How many requests for each deployment a report is the first to tell of, before it is taken in.

        What has ended since the last one and was not in that has begun since too (or it was read to its end only now:
        such a one counts twice).
        """
        before = self._gateways.get((gateway, incarnation))
        known = {row.id for row in before.rows} if before else set()
        named = {row.id for row in rows}
        came = Counter(row.deployment for row in rows if row.id not in known)
        over = Counter(row.deployment for row in before.rows if row.id not in named) if before else Counter()
        for name, count in finished.items():
            came[DeploymentName(name)] += max(0, count - over[DeploymentName(name)])
        return +came

    def moved(self, request: RequestId, target: ReplicaId) -> None:
        """Count a request at the replica that it was just handed over to, until its gateway reports it there."""
        for key, gateway in self._gateways.items():
            if any(row.id == request for row in gateway.rows):
                rows = tuple(replace(row, replica=target) if row.id == request else row for row in gateway.rows)
                self._gateways[key] = replace(gateway, rows=rows, running=_counted(rows))
                self._moved[request] = _Moved(target=target, reports=0)
        for ticket, granted in self._granted.items():
            if granted.row.id == request:
                self._granted[ticket] = replace(granted, row=replace(granted.row, replica=target))

    def granted(self, ticket: int, *, gateway: str, row: RequestRow, now: float) -> None:
        """Count a request that was just sent to a replica, until its gateway reports it."""
        self._granted[ticket] = _Granted(gateway=gateway, row=row, at=now, reports=Counter())

    def released(self, ticket: int) -> None:
        """A grant came to nothing: nobody was there to take it."""
        self._granted.pop(ticket, None)

    def forget_silent(self, now: float) -> None:
        """Drop gateways that have been silent for so long that they are gone, and what was granted to them.

        One that has closed its watch of the routes too is gone as soon as its report is overdue.
        """
        self._gateways = {n: g for n, g in self._gateways.items() if now < g.seen_at + FORGOTTEN_S}
        for name, watches in self._watches.items():
            known = sorted((g.seen_at, key) for key, g in self._gateways.items() if key[0] == name)
            for seen_at, key in known[: max(0, len(known) - watches)]:
                if now >= seen_at + OVERDUE_S:
                    del self._gateways[key]
        names = {name for name, _ in self._gateways}
        self._granted = {t: g for t, g in self._granted.items() if g.gateway in names or now < g.at + FORGOTTEN_S}
        if self._moved:
            open_now = {row.id for gateway in self._gateways.values() for row in gateway.rows}
            self._moved = {request: moved for request, moved in self._moved.items() if request in open_now}

    def watched(self, gateway: str, *, begins: bool) -> None:
        """A gateway has opened a watch of the routes, or closed it."""
        self._watches[gateway] = self._watches.get(gateway, 0) + (1 if begins else -1)

    def per_replica(self) -> Counter[ReplicaId]:
        total: Counter[ReplicaId] = Counter(
            granted.row.replica for granted in self._granted.values() if granted.row.replica
        )
        for gateway in self._gateways.values():
            total.update(gateway.running)
        return total

    def fresh(self, now: float) -> bool:
        """True if there is a gateway and none is overdue."""
        seen = [gateway.seen_at for gateway in self._gateways.values()]
        return bool(seen) and now < min(seen) + OVERDUE_S

    def rows(self) -> Iterator[RequestRow]:
        """What is known of each request; of one that comes twice, the later is the newer."""
        for gateway in self._gateways.values():
            yield from gateway.rows
        for granted in self._granted.values():
            yield granted.row

    def _placed(self, row: RequestRow) -> RequestRow:
        """A row as it is told, unless that was written before a handover that we know of."""
        moved = self._moved.get(row.id)
        if moved is None:
            return row
        moved = replace(moved, reports=moved.reports + 1)
        knows = row.replica == moved.target or row.state is not RequestState.RUNNING
        if knows or moved.reports >= _REPORTS_TO_CONFIRM:
            del self._moved[row.id]
            return row
        self._moved[row.id] = moved
        return replace(row, replica=moved.target)

    def _age(self, ticket: int, granted: _Granted, incarnation: str, *, seen: bool) -> None:
        granted.reports[incarnation] += 1
        if seen or granted.reports[incarnation] >= _REPORTS_TO_CONFIRM:
            del self._granted[ticket]


def _counted(rows: Iterable[RequestRow]) -> Counter[ReplicaId]:
    """How many requests run on each replica."""
    return Counter(row.replica for row in rows if row.state is RequestState.RUNNING and row.replica)
