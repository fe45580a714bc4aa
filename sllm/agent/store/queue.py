"""The loading queue: who reads. Pure.

One load at a time per storage device, because two at once share its bandwidth and both end later (paper §5.1: loads of
a server are sequential, so that its estimate q + n/b holds); a node's checkpoints are in one folder, which is on one
device. What is more urgent does not wait for all of what is read for less: it interrupts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Row(Generic[T]):
    item: T
    priority: int
    arrival: int
    begun: bool = False


class LoadingQueue(Generic[T]):
    """Items from their arrival to their end; `first` is the one that reads. Items are told by identity.

    They go by priority (the lowest number first); among equals who reads goes on, who has begun goes before who has
    not, because of the memory that it holds, and the others go in the order they came.
    """

    def __init__(self) -> None:
        self._rows: list[_Row[T]] = []
        self._arrivals = 0
        self._reads: _Row[T] | None = None

    def put(self, item: T, priority: int) -> None:
        self._rows.append(_Row(item, priority, self._arrivals))
        self._arrivals += 1

    def raise_to(self, item: T, priority: int) -> None:
        """Let an item go by a better priority, if it is one; it keeps its place among equals."""
        for row in self._rows:
            if row.item is item:
                row.priority = min(row.priority, priority)

    def remove(self, item: T) -> None:
        """It has ended, or nobody wants it any more. One that is not there is no error."""
        self._rows = [row for row in self._rows if row.item is not item]
        if self._reads is not None and self._reads.item is item:
            self._reads = None

    def first(self) -> T | None:
        """Return the item that is to read now. From then on it has begun."""
        self._reads = min(self._rows, key=self._order, default=None)
        if self._reads is None:
            return None
        self._reads.begun = True
        return self._reads.item

    def give_way(self, item: T) -> bool:
        """Let all others that have begun go before this one, at its priority: it needs what they hold. It has not
        begun any more then. Return False, and change nothing, if there are none."""
        mine = next((row for row in self._rows if row.item is item), None)
        others = [row for row in self._rows if row.begun and row is not mine]
        if mine is None or not others:
            return False
        for row in others:
            row.priority = min(row.priority, mine.priority)
        mine.begun = False
        if self._reads is mine:
            self._reads = None
        return True

    def _order(self, row: _Row[T]) -> tuple[int, bool, bool, int]:
        return row.priority, row is not self._reads, not row.begun, row.arrival
