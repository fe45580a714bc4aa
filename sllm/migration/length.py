"""How long a request is expected to run on, from how long others of its deployment were. Pure."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass, field

from sllm.core.ids import DeploymentName

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
        limit, mean = limit_left(output_tokens, max_tokens), self.mean_left(output_tokens)
        if mean is None:
            return limit
        return mean if limit is None else min(mean, limit)

    def mean_left(self, output_tokens: int) -> float | None:
        """The mean of those that were longer; None: too few were."""
        longer = self._sorted[bisect_right(self._sorted, output_tokens) :]
        return sum(longer) / len(longer) - output_tokens if len(longer) >= ENOUGH else None


def limit_left(output_tokens: int, max_tokens: int) -> int | None:
    """What its limit leaves it; None: it has none (`max_tokens` 0)."""
    return max(0, max_tokens - output_tokens) if max_tokens else None


@dataclass(slots=True)
class LengthsOfAll:
    """Those of each deployment; where too few of its own are known, those of all stand in. Mutable, for one owner."""

    _of: dict[DeploymentName, Lengths] = field(default_factory=dict)
    _all: Lengths = field(default_factory=Lengths)

    def finished(self, deployment: DeploymentName, output_tokens: int) -> None:
        self._of.setdefault(deployment, Lengths()).finished(output_tokens)
        self._all.finished(output_tokens)

    def forget(self, deployment: DeploymentName) -> None:
        self._of.pop(deployment, None)

    def left(self, deployment: DeploymentName, output_tokens: int, max_tokens: int) -> float | None:
        """As `Lengths.left`."""
        own = self._of.get(deployment)
        known = own if own is not None and own.mean_left(output_tokens) is not None else self._all
        return known.left(output_tokens, max_tokens)
