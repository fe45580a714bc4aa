"""Popularity: how often a deployment was asked for lately, as a rate that fades."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A request counts e times less every so many seconds: minutes ago still says something of the next minutes.
MEMORY_S = 300.0
# Of one that has just been heard of for the first time: one request is no rate.
LEAST_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Popularity:
    """`weight` is the number of requests as of `at`, each counted the less the older it is; the first was at `since`.

    Between two requests it fades, and does nothing else: when it falls below a bound can be said in advance.
    """

    since: float
    at: float
    weight: float

    def asked(self, requests: int, now: float) -> Popularity:
        """So many more have come by `now`."""
        return Popularity(since=self.since, at=now, weight=self.requests(now) + requests)

    def requests(self, now: float) -> float:
        """How many there were lately, faded."""
        return self.weight * math.exp(-(now - self.at) / MEMORY_S)

    def rate_rps(self, now: float) -> float:
        """Requests per second: over the time that it is known for, as far as that is remembered."""
        return self.requests(now) / self._window_s

    def falls_to(self, level_rps: float) -> float:
        """The time from which on its rate is at most this (> 0), if nobody asks meanwhile; it may be in the past."""
        rate_rps = self.rate_rps(self.at)
        return self.at + MEMORY_S * math.log(rate_rps / level_rps) if rate_rps > 0.0 else self.at

    @property
    def _window_s(self) -> float:
        known_s = MEMORY_S * (1.0 - math.exp(-(self.at - self.since) / MEMORY_S))
        return max(LEAST_WINDOW_S, known_s)


def first_asked(requests: int, now: float) -> Popularity:
    return Popularity(since=now, at=now, weight=float(requests))


def product_falls_to(one: Popularity, other: Popularity, level: float) -> float:
    """The time from which on the product of both rates is at most `level` (> 0), if nobody asks meanwhile; it may be
    in the past."""
    known_at = max(one.at, other.at)
    product = one.rate_rps(known_at) * other.rate_rps(known_at)
    if product <= 0.0:
        return known_at
    return known_at + MEMORY_S / 2.0 * math.log(product / level)
