"""The DRAM pool: which checkpoints this node holds in memory, within a budget. Belongs to one thread; reads nothing.

A checkpoint that does not fit beside what is pinned is still loaded, beyond the budget, and let go with its last pin.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sllm.core.launch import TensorEntry
from sllm.errors import CapacityExceeded
from sllm.loader.memory import region
from sllm.loader.tiers import Held, make_room


@dataclass(slots=True, kw_only=True, eq=False)
class Region:
    """A checkpoint in memory. `ready` once it is full and sealed; `pins` counts its users; `kept` within the budget."""

    digest: str
    fd: int
    size_bytes: int
    tensors: tuple[TensorEntry, ...]
    kept: bool
    last_used: float
    ready: bool = False
    reload_s: float = 0.0
    pins: int = 0
    uses: int = 0

    def as_held(self) -> Held:
        return Held(
            digest=self.digest,
            size_bytes=self.size_bytes,
            reload_s=self.reload_s,
            uses=self.uses,
            last_used=self.last_used,
            pinned=self.pins > 0 or not self.ready,
        )


class Pool:
    """`available_bytes` says how much memory the machine could give now."""

    def __init__(self, budget_bytes: int, available_bytes: Callable[[], int]) -> None:
        self.budget_bytes = budget_bytes
        self._available_bytes = available_bytes
        self._regions: dict[str, Region] = {}

    def regions(self) -> tuple[Region, ...]:
        return tuple(self._regions.values())

    def find(self, digest: str) -> Region | None:
        return self._regions.get(digest)

    @property
    def used_bytes(self) -> int:
        return sum(held.size_bytes for held in self._regions.values())

    def reserve(self, digest: str, tensors: Sequence[TensorEntry], size_bytes: int, now: float) -> Region:
        """Make an empty region, evicting what must go; it is pinned once, for whoever fills it.

        Raises CapacityExceeded if the machine has not that much memory to give.
        """
        kept = self._evict_for(size_bytes, now)
        available = self._available_bytes()
        if size_bytes > available:
            raise CapacityExceeded(
                f"the checkpoint needs {size_bytes} bytes of memory, the node has {available} to give",
                hint="use a node with more memory",
            )
        fd = region.create(f"sllm-{digest[-12:]}", size_bytes)
        made = Region(
            digest=digest, fd=fd, size_bytes=size_bytes, tensors=tuple(tensors), kept=kept, last_used=now, pins=1
        )
        self._regions[digest] = made
        return made

    def pin(self, held: Region, now: float) -> None:
        held.pins += 1
        held.uses += 1
        held.last_used = now

    def unpin(self, held: Region, now: float) -> None:
        """Let go of one pin; what is beyond the budget, or was never filled, goes with the last."""
        held.pins -= 1
        held.last_used = now
        if held.pins == 0 and not (held.kept and held.ready):
            self.drop(held)

    def drop(self, held: Region) -> None:
        """Forget a region. Who has mapped it keeps its memory."""
        if self._regions.get(held.digest) is held:
            del self._regions[held.digest]
            os.close(held.fd)

    def close(self) -> None:
        for held in self.regions():
            self.drop(held)

    def _evict_for(self, size_bytes: int, now: float) -> bool:
        free = self.budget_bytes - sum(held.size_bytes for held in self._regions.values() if held.kept)
        held = [copy.as_held() for copy in self._regions.values() if copy.kept]
        eviction = make_room(held, free_bytes=free, needed_bytes=size_bytes, now=now)
        for digest in eviction.victims or ():
            self.drop(self._regions[digest])
        return eviction.possible
