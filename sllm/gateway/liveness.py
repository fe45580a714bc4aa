"""When an engine host that has requests counts as dead (pure): it is silent, or its engine makes no step.

Hosts speak at least every two seconds to each gateway that has requests there, if only to say how many steps the engine
has made. Nobody asks them: what is due is computed, and looked at then.
"""

from __future__ import annotations

from sllm.core.tokens import FIRST_STEP_PATIENCE
from sllm.errors import EngineFailed, SllmError, Unavailable

# Looked at later than this, it was this process that stood still: what the host has said may lie unread.
_LATE_S = 1.0


class Liveness:
    """Of one connection; `now` is on any clock that does not jump. `begin` it when there are requests again."""

    def __init__(self, *, silence_s: float, stall_s: float, now: float) -> None:
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._steps = 0
        self._heard_at = self._stepped_at = now

    def begin(self, now: float) -> None:
        self._heard_at = self._stepped_at = now

    def heard(self, steps: int, now: float) -> None:
        self._heard_at = now
        if steps != self._steps:
            self._steps, self._stepped_at = steps, now

    @property
    def due_at(self) -> float:
        """When to look again: it is not dead before."""
        return min(self._heard_at + self._silence_s, self._stepped_at + self._patience_s)

    @property
    def _patience_s(self) -> float:
        return self._stall_s if self._steps else self._stall_s * FIRST_STEP_PATIENCE

    def problem(self, now: float) -> SllmError | None:
        """Return what it died of, if so."""
        if now < self.due_at:
            return None
        if now > self.due_at + _LATE_S:
            self.begin(now)
            return None
        if now >= self._heard_at + self._silence_s:
            return Unavailable(f"it gave no sign of life for {self._silence_s:g} s")
        return EngineFailed(f"its engine made no step for {self._patience_s:g} s")
