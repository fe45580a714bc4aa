"""Workload: requests drawn from a seed. When they come, for which model, how long they are and how noisy their service
is are drawn apart from each other: changing one leaves the others as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from sllm.core.ids import DeploymentName
from sllm.sim.noise import factor
from sllm.sim.spec import Arrival

Lengths = Callable[[Random], tuple[int, int]]
"""Draws the tokens of a prompt and of its output."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a trace: seconds since its first, and tokens."""

    at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """Requests with independent gaps, Gamma distributed with mean 1 / `rate_rps` and coefficient of variation `cv`;
    with a `cv` of 1 they are a Poisson process."""

    requests: int
    rate_rps: float
    lengths: Lengths
    cv: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`arrivals` are drawn, or recorded. Which of `models` is popular is drawn: their weights are 1 / rank^`exponent`
    (Zipf); 0: all alike. `pace_cv` is the noise of the requests' service."""

    arrivals: Renewal | Sequence[Row]
    models: Sequence[DeploymentName]
    exponent: float
    pace_cv: float = 0.0


def generate(workload: Workload, seed: int) -> list[Arrival]:
    """Return the requests in the order of their time. The same seed gives the same requests."""
    models = list(workload.models)
    Random(f"{seed}: popularity").shuffle(models)
    weights = [1.0 / (rank + 1) ** workload.exponent for rank in range(len(models))]
    rows = list(_rows(workload, seed))
    chosen = Random(f"{seed}: models").choices(models, weights, k=len(rows))
    noise = Random(f"{seed}: pace")
    return [
        Arrival(
            at=row.at,
            deployment=model,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            pace=factor(noise, workload.pace_cv),
        )
        for row, model in zip(rows, chosen, strict=True)
    ]


def _rows(workload: Workload, seed: int) -> Iterator[Row]:
    arrivals = workload.arrivals
    if not isinstance(arrivals, Renewal):
        yield from arrivals
        return
    gaps, lengths = Random(f"{seed}: gaps"), Random(f"{seed}: lengths")
    shape = 1.0 / arrivals.cv**2
    at = 0.0
    for _ in range(arrivals.requests):
        at += gaps.gammavariate(shape, 1.0 / (arrivals.rate_rps * shape))
        prompt_tokens, output_tokens = arrivals.lengths(lengths)
        yield Row(at, prompt_tokens, output_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    """Token counts whose logarithm is normal: `median`, and `sigma` of the logarithm; cut to the bounds."""

    median: float
    sigma: float
    least: int = 1
    most: int = 1_000_000

    def draw(self, rng: Random) -> int:
        return min(self.most, max(self.least, round(rng.lognormvariate(math.log(self.median), self.sigma))))
