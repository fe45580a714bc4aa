"""Noise of service and loading times: log-normal factors with mean 1."""

from __future__ import annotations

import math
from random import Random


def factor(rng: Random, cv: float) -> float:
    """Return a factor of mean 1 and coefficient of variation `cv`; 1 exactly, and nothing drawn, if that is 0."""
    if cv == 0:
        return 1.0
    variance = math.log1p(cv * cv)
    return rng.lognormvariate(-variance / 2, math.sqrt(variance))
