"""One quantity from its last measurements: the newest count most, and what is far off is clipped. Pure."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sllm.core.startup import Level

KEPT = 7  # so that four measurements of a new kind are the rule
FADE = 0.8  # weight of a measurement after each later one
CLIP = 1.5  # one counts as at most this many times the median, and at least one in so many


@dataclass(slots=True)
class Window:
    """The last measurements of one quantity, with weights: a mean fades, so that change is followed, and is of values
    clipped around their median, so that one that went wrong says little, the first one too. Mutable, for one owner."""

    _last: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    _count: int = 0

    def observe(self, value: float, weight: float = 1.0) -> Level:
        """Return the level with this measurement in it; `weight` is how much it says of the quantity, beside others."""
        self._last.append((value, weight))
        self._count += 1
        return self._level()

    @property
    def level(self) -> Level | None:
        return self._level() if self._last else None

    def _level(self) -> Level:
        return Level(value=faded_mean(list(self._last)), observations=self._count)


def faded_mean(measured: Sequence[tuple[float, float]]) -> float:
    """`measured` are (value, weight), the oldest first, at least one; values >= 0, weights > 0."""
    middle = _median(measured)
    total = whole = 0.0
    for age, (value, weight) in enumerate(reversed(measured)):
        faded = weight * FADE**age
        total += faded * min(max(value, middle / CLIP), middle * CLIP)
        whole += faded
    return total / whole


def _median(measured: Sequence[tuple[float, float]]) -> float:
    """The value in the middle of all weight."""
    ordered = sorted(measured)
    half, below = sum(weight for _, weight in ordered) / 2, 0.0
    for place, (value, weight) in enumerate(ordered):
        below += weight
        if below == half and place + 1 < len(ordered):
            return statistics.fmean((value, ordered[place + 1][0]))
        if below >= half:
            return value
    return ordered[-1][0]
