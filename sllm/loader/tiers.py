"""What a tier keeps when it is full: cost-aware LRU. Pure.

A copy's worth per byte is what it would cost to read it again, times how often it is asked for, over how long ago that
was. The least worthy go first, and none goes that need not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A copy on the tier, which `id` tells from others. `reload_s` is what reading it took; `pinned` copies are in use
    and stay."""

    id: int
    size_bytes: int
    reload_s: float
    uses: int
    last_used: float
    pinned: bool = False


def worth(copy: Held, now: float) -> float:
    """Return the worth of a byte of this copy."""
    age_s = max(0.0, now - copy.last_used)
    return copy.reload_s * copy.uses / (max(1, copy.size_bytes) * (1.0 + age_s))


def make_room(held: Iterable[Held], *, free_bytes: int, needed_bytes: int, now: float) -> tuple[int, ...] | None:
    """Return what to evict so that `needed_bytes` fit, the least worthy first; None if even all would not make room."""
    short = needed_bytes - free_bytes
    if short <= 0:
        return ()
    candidates = sorted((copy for copy in held if not copy.pinned), key=lambda copy: (worth(copy, now), copy.id))
    chosen: list[Held] = []
    for copy in candidates:
        if short <= 0:
            break
        chosen.append(copy)
        short -= copy.size_bytes
    if short > 0:
        return None
    return tuple(copy.id for copy in _spare_the_worthy(chosen, -short))


def _spare_the_worthy(chosen: list[Held], surplus: int) -> list[Held]:
    """Drop, from the worthiest on, victims whose room is not needed after all."""
    kept: list[Held] = []
    for copy in reversed(chosen):
        if copy.size_bytes <= surplus:
            surplus -= copy.size_bytes
        else:
            kept.append(copy)
    return kept[::-1]
