"""Events in virtual time: what happens when, in an order that does not depend on anything but the calls made."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

Action = Callable[..., None]


class EventQueue:
    """A virtual clock: `now` is the time in seconds of the last event that was carried out, 0 before the first.

    Nothing is ever taken back: who schedules what may be overtaken has to see that it is.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._number = 0

    def at(self, time: float, action: Action, *arguments: Any) -> None:
        """Carry out `action` at `time`, or now if that is past; at one time, the first scheduled goes first."""
        heapq.heappush(self._heap, (max(time, self.now), self._number, action, arguments))
        self._number += 1

    def advance(self) -> bool:
        """Carry out all that happens at the next instant; False if nothing is left to happen."""
        if not self._heap:
            return False
        self.now = self._heap[0][0]
        while self._heap and self._heap[0][0] == self.now:
            _, _, action, arguments = heapq.heappop(self._heap)
            self.count += 1
            action(*arguments)
        return True
