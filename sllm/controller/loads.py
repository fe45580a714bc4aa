"""Loads: how many requests each replica has, from what gateways report and what was granted since. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sllm.core.ids import ReplicaId
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


class Loads:
    def __init__(self) -> None:
        # By name and incarnation: two processes may have been given one name.
        self._gateways: dict[tuple[str, str], _Gateway] = {}
        self._granted: dict[int, _Granted] = {}
        # Open route watches, by name; 0 once all have been closed.
        self._watches: dict[str, int] = {}

    def report(self, gateway: str, incarnation: str, rows: tuple[RequestRow, ...], now: float) -> None:
        """Take a gateway's whole report; what is not in it is over."""
        running = [row for row in rows if row.state is RequestState.RUNNING]
        counted = Counter(row.replica for row in running if row.replica)
        self._gateways[gateway, incarnation] = _Gateway(rows=rows, running=counted, seen_at=now)
        confirmed = {row.id for row in running}
        for ticket, granted in list(self._granted.items()):
            if granted.gateway == gateway:
                self._age(ticket, granted, incarnation, seen=granted.row.id in confirmed)

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

    def _age(self, ticket: int, granted: _Granted, incarnation: str, *, seen: bool) -> None:
        granted.reports[incarnation] += 1
        if seen or granted.reports[incarnation] >= _REPORTS_TO_CONFIRM:
            del self._granted[ticket]
