"""Covering: of what could give way on one node, the choice that frees enough devices at the least cost. Pure.

A dynamic program over the number of devices that are freed, at least so many and not exactly so many: one that has more
devices than are missing may be the best of all (docs/decisions/0015-a-covering-program-frees-devices.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from sllm.core.ids import ReplicaId
from sllm.core.snapshot import ReplicaView
from sllm.scheduler.refuge import NOTHING_RESERVED, Refuge, Reserved

KEPT_PER_CELL = 8  # choices of which none is better in every respect


class Way(IntEnum):
    """How devices become free, the one first that disturbs least."""

    LEAVING = 0  # its replica is on its way out already
    STOP = 1  # it is idle, and nobody needs it: it is let go
    WAIT = 2  # what runs on it is expected to end
    MOVE = 3  # what runs on it is moved elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Give:
    """One way in which a replica gives its devices. `width` are those that the newcomer can use; they are free in
    `free_s` seconds. `pause_s` is what clients of its requests wait for it, all together; `rank`: who is to go first
    where that is all the same."""

    replica: ReplicaView
    way: Way
    width: int
    free_s: float
    pause_s: float = 0.0
    rank: int = 0
    refuge: Refuge | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """Replicas that give their devices at the same time: these are free when the last of them are. `reserved` is where
    what runs on them goes on."""

    gives: tuple[Give, ...] = ()
    width: int = 0
    free_s: float = 0.0
    pause_s: float = 0.0
    reserved: Reserved = NOTHING_RESERVED

    @property
    def cost_s(self) -> float:
        """Seconds that clients wait because of it: who waits for the devices, and whose requests are moved."""
        return self.free_s + self.pause_s

    @property
    def way(self) -> Way:
        """The most disturbing of its ways."""
        return max((give.way for give in self.gives), default=Way.LEAVING)

    @property
    def order(self) -> tuple[float, Way, tuple[int, ...], int, tuple[ReplicaId, ...]]:
        """The least is the best."""
        ranks = tuple(sorted(give.rank for give in self.gives))
        return (self.cost_s, self.way, ranks, self.width, tuple(sorted(give.replica.spec.id for give in self.gives)))

    def with_one(self, give: Give) -> Cover:
        return Cover(
            gives=(*self.gives, give),
            width=self.width + give.width,
            free_s=max(self.free_s, give.free_s),
            pause_s=self.pause_s + give.pause_s,
            reserved=give.refuge.reserved if give.refuge else self.reserved,
        )


Ways = Callable[[ReplicaView, Reserved], Iterable[Give]]
"""How a replica could give its devices, where this is reserved for others already."""

NOTHING: Final = Cover()


def covers(missing: int, replicas: Sequence[ReplicaView], ways: Ways) -> list[Cover]:
    """The choices that free at least `missing` > 0 devices, the cheapest first; none, if all are too few.

    Moves of different replicas run at the same time, so devices are free when the slowest give is done: a cheaper
    choice of few devices is not always a part of the cheapest of many. Each cell therefore keeps the choices of which
    none is better both in time and in what it costs others.
    """
    cells: list[list[Cover]] = [[] for _ in range(missing + 1)]
    cells[0] = [NOTHING]
    for replica in replicas:
        # Downwards, so that none is used twice.
        for freed in reversed(range(missing)):
            for cover in cells[freed]:
                for give in ways(replica, cover.reserved):
                    after = cover.with_one(give)
                    cell = min(missing, freed + give.width)
                    cells[cell] = _kept([*cells[cell], after])
    return sorted(cells[missing], key=lambda cover: cover.order)


def _kept(found: list[Cover]) -> list[Cover]:
    """Those of which none is better both in time and in pauses, the cheapest first."""
    kept: list[Cover] = []
    for cover in sorted(found, key=lambda c: c.order):
        if all(cover.free_s < other.free_s or cover.pause_s < other.pause_s for other in kept):
            kept.append(cover)
    return kept[:KEPT_PER_CELL]
