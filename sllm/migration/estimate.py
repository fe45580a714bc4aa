"""What recomputing costs, learnt from rounds: a * t + b per (checkpoint, device kind) (paper §5.2). Pure.

Recursive least squares with forgetting. An observation far off what was predicted counts as if it were less far off:
one round behind somebody's long prompt must not spoil the estimate.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from sllm.core.migration import RecomputeCost

FORGET = 0.95  # weight of an observation after each later one
OUTLIER = 3.0  # an observation counts as at most this many times what was expected, and at least one in so many
KEPT_ERRORS = 200
TRUST = 5  # observations before outliers are clipped


@dataclass(slots=True)
class RecomputeEstimate:
    """Mutable, for one owner: the sums of a weighted least-squares line, and how wrong it was lately."""

    _weight: float = 0.0
    _t: float = 0.0
    _tt: float = 0.0
    _s: float = 0.0
    _ts: float = 0.0
    _observations: int = 0
    _errors: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_ERRORS))

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in that `tokens` tokens (those that no cache had) took `seconds`."""
        if tokens <= 0 or seconds <= 0:
            return
        if self._observations >= TRUST:
            expected = predicted_s(self.cost, tokens)
            self._errors.append(abs(expected - seconds) / seconds)
            seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        t = float(tokens)
        for name, value in (("_weight", 1.0), ("_t", t), ("_tt", t * t), ("_s", seconds), ("_ts", t * seconds)):
            setattr(self, name, FORGET * getattr(self, name) + value)
        self._observations += 1

    @property
    def cost(self) -> RecomputeCost:
        """Neither part is ever negative."""
        if self._observations == 0:
            return RecomputeCost()
        spread = self._weight * self._tt - self._t * self._t
        slope = (self._weight * self._ts - self._t * self._s) / spread if spread > 1e-9 * self._tt else 0.0
        fixed = (self._s - slope * self._t) / self._weight
        if slope <= 0 or fixed < 0:  # too little spread, or noise: a line through the origin
            slope, fixed = self._ts / self._tt, 0.0
        return RecomputeCost(per_token_s=slope, fixed_s=fixed, observations=self._observations)

    @property
    def error(self) -> tuple[float, float] | None:
        """Median and 95th percentile of |predicted - measured| / measured, of the last ones; None: none yet."""
        if not self._errors:
            return None
        ordered = sorted(self._errors)
        return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def predicted_s(cost: RecomputeCost, tokens: int) -> float:
    return cost.fixed_s + cost.per_token_s * tokens


def updated(cost: RecomputeCost, tokens: int, seconds: float) -> RecomputeCost:
    """What one migration learns for its own next round: the newest measurement, and what was known of `fixed_s`.

    What happens now at this destination says more of its next round than what happened elsewhere.
    """
    if tokens <= 0:
        return cost
    fixed_s = min(cost.fixed_s, seconds)
    per_token_s = (seconds - fixed_s) / tokens
    return RecomputeCost(per_token_s=per_token_s, fixed_s=fixed_s, observations=cost.observations + 1)
