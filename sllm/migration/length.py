"""How long a request is expected to run on, from how long others of its deployment were. Pure."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass, field

KEPT = 512
ENOUGH = 5  # longer ones, before they are taken for a rule


@dataclass(slots=True)
class Lengths:
    """Output lengths (tokens) of the last requests that finished. Mutable, for one owner."""

    _last: deque[int] = field(default_factory=deque)
    _sorted: list[int] = field(default_factory=list)

    def finished(self, output_tokens: int) -> None:
        """Take in how many tokens a request had when it ended."""
        if len(self._last) == KEPT:
            self._sorted.remove(self._last.popleft())
        self._last.append(output_tokens)
        insort(self._sorted, output_tokens)

    def left(self, output_tokens: int, max_tokens: int) -> float | None:
        """Return how many more tokens a request with so many is expected to have; None: nobody knows.

        The mean of those that were longer; where few were, what its limit leaves. `max_tokens` 0: it has no limit.
        """
        limit = max(0, max_tokens - output_tokens) if max_tokens else None
        longer = self._sorted[bisect_right(self._sorted, output_tokens) :]
        if len(longer) < ENOUGH:
            return limit
        mean = sum(longer) / len(longer) - output_tokens
        return mean if limit is None else min(mean, limit)
