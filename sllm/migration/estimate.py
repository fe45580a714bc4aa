"""What recomputing costs, learnt from rounds: a * t + b per (checkpoint, device kind) (paper §5.2). Pure.

Least squares with forgetting, of relative errors: rounds differ a hundredfold in size, and the last ones, which are
small, say most of the pause. An observation far off what was predicted counts as if it were less far off: one round
behind somebody's long prompt must not spoil the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm.core.migration import RecomputeCost
from sllm.core.prediction import PredictionErrors

FORGET = 0.95  # weight of an observation after each later one
OUTLIER = 3.0  # an observation counts as at most this many times what was expected, and at least one in so many
TRUST = 5  # observations before outliers are clipped
SPREAD = 0.05  # of squared sizes: below it, rounds are too much alike to tell the two parts of the cost from each other
GUESSED_TOKENS = 16  # a migration's first guess of `fixed_s`: an engine step takes about as long as so many tokens


@dataclass(slots=True)
class RecomputeEstimate:
    """Mutable, for one owner: the sums of a weighted least-squares line, and how wrong it was lately."""

    _weight: float = 0.0
    _t: float = 0.0
    _tt: float = 0.0
    _s: float = 0.0
    _ts: float = 0.0
    _observations: int = 0
    _errors: PredictionErrors = field(default_factory=PredictionErrors)

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in that `tokens` tokens (those that no cache had) took `seconds`."""
        if tokens <= 0 or seconds <= 0:
            return
        expected = predicted_s(self.cost, tokens) if self._observations >= TRUST else seconds
        if self._observations >= TRUST:
            self._errors.note(expected, seconds)
        self._add(float(tokens), min(max(seconds, expected / OUTLIER), expected * OUTLIER), weight=expected**-2)
        self._observations += 1

    def _add(self, t: float, s: float, *, weight: float) -> None:
        self._weight = FORGET * self._weight + weight
        self._t = FORGET * self._t + weight * t
        self._tt = FORGET * self._tt + weight * t * t
        self._s = FORGET * self._s + weight * s
        self._ts = FORGET * self._ts + weight * t * s

    @property
    def cost(self) -> RecomputeCost:
        """Neither part is ever negative, and recomputing is never free: no long request must seem to cost nothing."""
        if self._observations == 0:
            return RecomputeCost()
        spread = self._weight * self._tt - self._t * self._t
        told_apart = spread > SPREAD * self._weight * self._tt
        slope = (self._weight * self._ts - self._t * self._s) / spread if told_apart else 0.0
        fixed = (self._s - slope * self._t) / self._weight
        if slope <= 0 or fixed < 0:  # too much alike, or noise: a line through the origin
            slope, fixed = self._ts / self._tt, 0.0
        return RecomputeCost(per_token_s=slope, fixed_s=fixed, observations=self._observations)

    @property
    def error(self) -> tuple[float, float] | None:
        """Median and 95th percentile of |predicted - measured| / measured, of the last ones; None: none yet."""
        return self._errors.quantiles


def predicted_s(cost: RecomputeCost, tokens: int) -> float:
    return cost.fixed_s + cost.per_token_s * tokens


def updated(cost: RecomputeCost, tokens: int, seconds: float) -> RecomputeCost:
    """What one migration learns for its own next round, and an order for its next request.

    What happens now at this destination says more of it than what happened elsewhere, so the newest measurement counts
    in full; but a small round tells of `fixed_s`, a large one of `per_token_s`: each part takes its share of what was
    wrong, by the square of what it was expected to take, and at most halves or doubles.
    """
    if tokens <= 0 or seconds <= 0:
        return cost
    expected = predicted_s(cost, tokens)
    if cost.observations == 0 or expected <= 0:
        per_token_s = seconds / (tokens + GUESSED_TOKENS)
        return RecomputeCost(per_token_s=per_token_s, fixed_s=GUESSED_TOKENS * per_token_s, observations=1)
    of_tokens, wrong = cost.per_token_s * tokens, seconds - expected
    whole = of_tokens**2 + cost.fixed_s**2
    return RecomputeCost(
        per_token_s=cost.per_token_s * _within(1 + wrong * of_tokens / whole),
        fixed_s=cost.fixed_s * _within(1 + wrong * cost.fixed_s / whole),
        observations=cost.observations + 1,
    )


def _within(factor: float) -> float:
    return min(max(factor, 0.5), 2.0)
