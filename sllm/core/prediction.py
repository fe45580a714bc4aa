"""How wrong predictions of a duration were, lately."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

KEPT_ERRORS = 200


@dataclass(slots=True)
class PredictionErrors:
    """|predicted - measured| / measured of the last ones. Mutable, for one owner."""

    _last: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_ERRORS))

    def note(self, predicted_s: float, measured_s: float) -> None:
        """`measured_s` > 0."""
        self._last.append(abs(predicted_s - measured_s) / measured_s)

    def __len__(self) -> int:
        return len(self._last)

    @property
    def quantiles(self) -> tuple[float, float] | None:
        """Median and 95th percentile; None: there is none yet."""
        if not self._last:
            return None
        ordered = sorted(self._last)
        return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
