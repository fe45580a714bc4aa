"""The loading queue: who reads next. Pure.

One load at a time per storage device, because two at once share its bandwidth and both end later; a node's checkpoints
are in one folder, which is on one device.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class LoadingQueue(Generic[T]):
    """Items leave by priority (the lowest number first), then in the order they came. Items are told by identity."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, T]] = []
        self._arrivals = 0

    def put(self, item: T, priority: int) -> None:
        self._waiting.append((priority, self._arrivals, item))
        self._arrivals += 1

    def raise_to(self, item: T, priority: int) -> None:
        """Let an item that waits go by a better priority, if it is one; it keeps its place among equals."""
        self._waiting = [
            (min(priority, before) if each is item else before, arrival, each)
            for before, arrival, each in self._waiting
        ]

    def remove(self, item: T) -> None:
        """One that does not wait is no error."""
        self._waiting = [row for row in self._waiting if row[2] is not item]

    def pop(self) -> T | None:
        if not self._waiting:
            return None
        first = min(self._waiting, key=lambda row: row[:2])
        self._waiting.remove(first)
        return first[2]
