"""Loads: how many requests each replica has, from what gateways report and what was granted since. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sllm.core.ids import ReplicaId, RequestId
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
    request: RequestId
    replica: ReplicaId
    at: float
    reports: int = 0


class Loads:
    def __init__(self) -> None:
        self._gateways: dict[str, _Gateway] = {}
        self._granted: dict[int, _Granted] = {}

    def report(self, gateway: str, rows: tuple[RequestRow, ...], now: float) -> None:
        """Take a gateway's whole report; what is not in it is over."""
        running = [row for row in rows if row.state is RequestState.RUNNING]
        counted = Counter(row.replica for row in running if row.replica)
        self._gateways[gateway] = _Gateway(rows=rows, running=counted, seen_at=now)
        confirmed = {row.id for row in running}
        for ticket, granted in list(self._granted.items()):
            if granted.gateway == gateway:
                self._age(ticket, granted, seen=granted.request in confirmed)

    def granted(self, ticket: int, *, gateway: str, request: RequestId, replica: ReplicaId, now: float) -> None:
        """Count a request that was just sent to a replica, until its gateway reports it."""
        self._granted[ticket] = _Granted(gateway=gateway, request=request, replica=replica, at=now)

    def released(self, ticket: int) -> None:
        """A grant came to nothing: nobody was there to take it."""
        self._granted.pop(ticket, None)

    def forget_silent(self, now: float) -> None:
        """Drop gateways that have been silent for so long that they are gone, and what was granted to them."""
        self._gateways = {n: g for n, g in self._gateways.items() if now < g.seen_at + FORGOTTEN_S}
        self._granted = {
            t: g for t, g in self._granted.items() if g.gateway in self._gateways or now < g.at + FORGOTTEN_S
        }

    def per_replica(self) -> Counter[ReplicaId]:
        total: Counter[ReplicaId] = Counter(granted.replica for granted in self._granted.values())
        for gateway in self._gateways.values():
            total.update(gateway.running)
        return total

    def fresh(self, now: float) -> bool:
        """True if there is a gateway and none is overdue."""
        seen = [gateway.seen_at for gateway in self._gateways.values()]
        return bool(seen) and now < min(seen) + OVERDUE_S

    def rows(self) -> Iterator[RequestRow]:
        for gateway in self._gateways.values():
            yield from gateway.rows

    def _age(self, ticket: int, granted: _Granted, *, seen: bool) -> None:
        if seen or granted.reports + 1 >= _REPORTS_TO_CONFIRM:
            del self._granted[ticket]
        else:
            self._granted[ticket] = replace(granted, reports=granted.reports + 1)
