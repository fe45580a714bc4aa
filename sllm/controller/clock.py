"""The two clocks of the controller, passed in so that tests move time instead of waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """`wall` is for timestamps that people read; `monotonic` is what decisions go by."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
