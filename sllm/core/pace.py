"""Pace: how fast the tokens of one sequence come, as whoever reads them sees it."""

from __future__ import annotations

from dataclasses import dataclass

# How much the latest token weighs in the interval: one that was late by chance must not look like a trend.
_LATEST = 0.2


@dataclass(slots=True)
class Pace:
    """`interval_s` is the time between two tokens, smoothed; None before the second. It changes with every token."""

    interval_s: float | None = None
    _last_at: float | None = None

    def advance(self, tokens: int, now: float) -> None:
        """Note that so many tokens have come at `now`, on any clock that does not jump."""
        if not tokens:
            return
        if self._last_at is not None:
            latest_s = (now - self._last_at) / tokens
            before_s = latest_s if self.interval_s is None else self.interval_s
            self.interval_s = before_s + _LATEST * (latest_s - before_s)
        self._last_at = now

    def pause(self) -> None:
        """The next token comes of another engine: how long it takes to come says nothing of the interval."""
        self._last_at = None
