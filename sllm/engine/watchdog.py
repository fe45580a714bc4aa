"""Decides whether an engine hangs. Pure: it counts beats of its host, and sees no clock."""

from __future__ import annotations

import math

from sllm.core.tokens import FIRST_STEP_PATIENCE


class Watchdog:
    """Asked at each beat. Beats and not seconds: a pause of the whole process (SIGSTOP, a suspended machine) is one
    beat long, and is not the engine's fault."""

    def __init__(self, stall_s: float, beat_s: float) -> None:
        self._limit = max(1, math.ceil(stall_s / beat_s))
        self._steps = 0
        self._beats = 0

    def hangs(self, working: bool, steps: int) -> bool:
        """Return True once an engine that has work has ended no step for the time given."""
        if not working or steps != self._steps:
            self._beats, self._steps = 0, steps
            return False
        self._beats += 1
        return self._beats >= (self._limit if steps else self._limit * FIRST_STEP_PATIENCE)
