"""A node's DRAM pool: which checkpoints it holds, by the eviction that nodes really use (`sllm.loader.tiers`)."""

from __future__ import annotations

from dataclasses import dataclass

from sllm.loader.tiers import Held, make_room


@dataclass(slots=True)
class Copy:
    """One checkpoint in the pool. `ready` once all of it has been read; `pins` counts who needs it to stay."""

    digest: str
    size_bytes: int
    id: int
    last_used: float
    uses: int = 1
    reload_s: float = 0.0
    ready: bool = False
    pins: int = 0


class Pool:
    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.copies: dict[str, Copy] = {}
        self._made = 0

    def use(self, digest: str, now: float) -> Copy | None:
        """Return the copy, which is asked for now, or None if there is none."""
        copy = self.copies.get(digest)
        if copy is not None:
            copy.uses += 1
            copy.last_used = now
        return copy

    def make(self, digest: str, size_bytes: int, now: float) -> Copy | None:
        """Give a new copy its room, evicting others; None if it does not fit beside what is pinned."""
        held = [
            Held(
                id=copy.id,
                size_bytes=copy.size_bytes,
                reload_s=copy.reload_s,
                uses=copy.uses,
                last_used=copy.last_used,
                pinned=copy.pins > 0,
            )
            for copy in self.copies.values()
        ]
        free_bytes = self.capacity_bytes - self.used_bytes
        evicted = make_room(held, free_bytes=free_bytes, needed_bytes=size_bytes, now=now)
        if evicted is None:
            return None
        for copy in [copy for copy in self.copies.values() if copy.id in evicted]:
            self.drop(copy)
        self._made += 1
        made = Copy(digest=digest, size_bytes=size_bytes, id=self._made, last_used=now)
        self.copies[digest] = made
        self.used_bytes += size_bytes
        return made

    def drop(self, copy: Copy) -> None:
        del self.copies[copy.digest]
        self.used_bytes -= copy.size_bytes
