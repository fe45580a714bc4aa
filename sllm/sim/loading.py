"""A node's loading queue in virtual time: one checkpoint is read at a time, the more urgent interrupts the less urgent.

The order is that of the store process (`sllm.agent.store.queue`; paper §5.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sllm.core.priority import Priority
from sllm.sim.events import EventQueue
from sllm.sim.pool import Copy


@dataclass(slots=True, eq=False)
class Load:
    """One checkpoint on its way from SSD. `copy` None: it streams through and is not kept. `left_s` is what reading it
    takes from here on, `read_s` what it has taken; `starts` counts who waits for it."""

    digest: str
    size_bytes: int
    priority: Priority
    copy: Copy | None
    left_s: float
    asked_at: float
    arrival: int = 0
    begun: bool = False
    read_s: float = 0.0
    starts: int = 0


class LoadingQueue:
    """`on_begun` and `on_done` are told of a load's first turn and of its end."""

    def __init__(
        self, events: EventQueue, *, on_begun: Callable[[Load], None], on_done: Callable[[Load], None]
    ) -> None:
        self._events = events
        self._on_begun = on_begun
        self._on_done = on_done
        self._loads: dict[str, Load] = {}
        self._arrivals = 0
        self._reading: Load | None = None
        self._since = 0.0
        self._turn_number = 0

    def of(self, digest: str) -> Load | None:
        return self._loads.get(digest)

    def put(self, load: Load) -> None:
        load.arrival = self._arrivals
        self._arrivals += 1
        self._loads[load.digest] = load
        self._turn()

    def raise_to(self, load: Load, priority: Priority) -> None:
        load.priority = min(load.priority, priority)
        self._turn()

    def remove(self, load: Load) -> None:
        """Nobody waits for it any more."""
        del self._loads[load.digest]
        self._turn()

    def clear(self) -> None:
        self._loads.clear()
        self._turn()

    def _order(self, load: Load) -> tuple[int, bool, bool, int]:
        return load.priority, load is not self._reading, not load.begun, load.arrival

    def _turn(self) -> None:
        first = min(self._loads.values(), key=self._order, default=None)
        if first is self._reading:
            return
        now = self._events.now
        if self._reading is not None:
            self._reading.left_s -= now - self._since
            self._reading.read_s += now - self._since
        self._reading, self._since = first, now
        self._turn_number += 1
        if first is None:
            return
        self._events.at(now + first.left_s, self._done, first, self._turn_number)
        if not first.begun:
            first.begun = True
            self._on_begun(first)

    def _done(self, load: Load, turn: int) -> None:
        if turn != self._turn_number:
            return  # it was interrupted, or called off
        load.read_s += self._events.now - self._since
        del self._loads[load.digest]
        self._reading = None
        self._on_done(load)
        self._turn()
