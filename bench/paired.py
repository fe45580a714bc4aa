"""Two policies on the same seeds: the ratio of their means, with a bootstrap interval over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Ratio:
    """`value` is mean(others) / mean(ours); 95 % of resamples lie from `low` to `high`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} - {self.high:.2f})"


def ratio(others: Sequence[float], ours: Sequence[float], *, seed: int = 1) -> Ratio:
    """Pairs by seed: both are resampled together. Where ours is 0 throughout, 1 if others are too, else infinite."""
    pairs = list(zip(others, ours, strict=True))
    rng = Random(seed)
    drawn = sorted(_of(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return Ratio(_of(pairs), drawn[round(0.025 * RESAMPLES)], drawn[round(0.975 * RESAMPLES) - 1])


def _of(pairs: Sequence[tuple[float, float]]) -> float:
    other, own = (sum(column) for column in zip(*pairs, strict=True))
    if own == 0:
        return 1.0 if other == 0 else float("inf")
    return other / own
