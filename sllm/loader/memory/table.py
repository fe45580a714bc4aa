"""Which checkpoint partitions a DRAM pool holds, and where. Pure: no clock, no memory, no locks; one caller at a time.

The pool's bytes are divided into extents of whole POOL_BLOCK_BYTES, and each belongs to exactly one of: free space, an
entry, or what is *kept back*: memory whose entry is gone while somebody still holds a lease on it. `leased` tells
whether anybody does; it is asked (never remembered), because a lease ends without a message, with its last holder.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from sllm.core.grant import POOL_BLOCK_BYTES, Chunked, Extent, chunks_in
from sllm.loader.memory.extents import FreeSpace
from sllm.loader.tiers import Held, make_room

Leased = Callable[[Sequence[Extent]], bool]


class EntryState(StrEnum):
    LOADING = "loading"  # being read from SSD
    VERIFYING = "verifying"  # inherited from a store process that died; compared with its manifest before it counts
    READY = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Chunked):
    """One partition in the pool. `digest` names the content of its folder, `checkpoint` the checkpoint it stands for
    (another one only for a runtime layout). `slots` is the number of chunks that `extents` hold: fewer than there are
    in a ring, which only its one reader may use. `reload_s` is what reading it took; `last_used` is monotonic time.
    """

    generation: int
    digest: str
    partition: int
    checkpoint: str
    folder: str
    size_bytes: int
    chunk_bytes: int
    slots: int
    extents: tuple[Extent, ...]
    state: EntryState = EntryState.LOADING
    reload_s: float = 0.0
    uses: int = 0
    last_used: float = 0.0

    @property
    def key(self) -> tuple[str, int]:
        return self.digest, self.partition

    @property
    def held_bytes(self) -> int:
        """Bytes of the pool that it takes."""
        return sum(extent.size_bytes for extent in self.extents)

    def as_json(self) -> dict[str, Any]:
        """Return the fields; `json` makes lists of extents and text of the state.

        Not `asdict`: that takes half the time of a grant.
        """
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Entry:
        """Raises ValueError, TypeError or KeyError for what `as_json` cannot have made."""
        extents = tuple(Extent(*map(_count, extent)) for extent in values["extents"])
        counts = ("generation", "partition", "size_bytes", "chunk_bytes", "slots", "uses")
        checked = {name: _count(values[name]) for name in counts}
        if checked["chunk_bytes"] == 0:
            raise ValueError("chunks of no bytes")
        return cls(**{**values, **checked, "extents": extents, "state": EntryState(values["state"])})


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


class Table:
    """The whole pool. Generations begin at `generation` and are never used again."""

    def __init__(self, size_bytes: int, generation: int) -> None:
        if size_bytes <= 0 or size_bytes % POOL_BLOCK_BYTES:
            raise ValueError(f"a pool of {size_bytes} bytes is not whole blocks of {POOL_BLOCK_BYTES}")
        self.size_bytes = size_bytes
        self._generation = generation
        self._free = FreeSpace((Extent(0, size_bytes),), POOL_BLOCK_BYTES)
        self._kept_back: list[Extent] = []
        self._entries: dict[int, Entry] = {}

    @classmethod
    def adopt(cls, size_bytes: int, generation: int, entries: Iterable[Entry], leased: Leased) -> Table:
        """Take over the pool of a process that died: what it had read whole is to be verified, the rest is dropped.

        Memory that no entry accounts for may be leased all the same: it is kept back. Raises ValueError if entries
        overlap or lie outside the pool.
        """
        entries = tuple(entries)
        table = cls(size_bytes, max([generation, *(entry.generation + 1 for entry in entries)]))
        whole = [entry for entry in entries if entry.state is not EntryState.LOADING and not entry.is_ring]
        for entry in whole:
            table._free.remove(entry.extents)
            table._entries[entry.generation] = replace(entry, state=EntryState.VERIFYING)
        loose = table._free.extents
        table._free = FreeSpace((), POOL_BLOCK_BYTES)
        table._let_go(loose, leased)
        return table

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries.values())

    @property
    def free_bytes(self) -> int:
        return self._free.size_bytes

    @property
    def kept_back_bytes(self) -> int:
        """Bytes that belong to no entry and were leased when last asked."""
        return sum(extent.size_bytes for extent in self._kept_back)

    def find(self, digest: str, partition: int) -> Entry | None:
        """Return the entry that others may use; a ring is none."""
        for entry in self._entries.values():
            if entry.key == (digest, partition) and not entry.is_ring:
                return entry
        return None

    def get(self, generation: int) -> Entry | None:
        return self._entries.get(generation)

    def victims(
        self, size_bytes: int, now: float, leased: Leased, awaited: Container[int] = ()
    ) -> tuple[Entry, ...] | None:
        """Choose what must go so that `size_bytes` fit; None if they cannot.

        What is read or leased stays, and so does what has a generation in `awaited`: somebody waits until it is
        verified. What nobody waits for can be read again.
        """
        self.reclaim(leased)
        needed = whole_blocks(size_bytes)
        if needed <= self.free_bytes:  # the usual case asks nobody about leases
            return ()
        held = [_as_held(entry, leased, awaited) for entry in self._entries.values()]
        chosen = make_room(held, free_bytes=self.free_bytes, needed_bytes=needed, now=now)
        return None if chosen is None else tuple(self._entries[generation] for generation in chosen)

    def ring_slots(
        self, chunk_bytes: int, wanted: int, now: float, leased: Leased, awaited: Container[int] = ()
    ) -> int:
        """Return how many slots of at most `wanted` could be had, evicting what can go; 0 if none."""
        for slots in range(wanted, 0, -1):
            if self.victims(slots * chunk_bytes, now, leased, awaited) is not None:
                return slots
        return 0

    def add(
        self,
        *,
        digest: str,
        partition: int,
        checkpoint: str,
        folder: str,
        size_bytes: int,
        chunk_bytes: int,
        slots: int,
        now: float,
    ) -> Entry:
        """Take free memory for `slots` chunks. Raises ValueError if there is too little: evict first."""
        entry = Entry(
            generation=self._generation,
            digest=digest,
            partition=partition,
            checkpoint=checkpoint,
            folder=folder,
            size_bytes=size_bytes,
            chunk_bytes=chunk_bytes,
            slots=slots,
            extents=self._free.take(whole_blocks(min(size_bytes, slots * chunk_bytes))),
            last_used=now,
        )
        self._generation += 1
        self._entries[entry.generation] = entry
        return entry

    def ready(self, generation: int, reload_s: float | None = None) -> Entry:
        """Its bytes are all there and verified. Without `reload_s` what is known of it stays."""
        entry = self._entries[generation]
        entry = replace(entry, state=EntryState.READY, reload_s=entry.reload_s if reload_s is None else reload_s)
        self._entries[generation] = entry
        return entry

    def use(self, generation: int, now: float) -> Entry:
        """It was asked for."""
        entry = self._entries[generation]
        self._entries[generation] = entry = replace(entry, uses=entry.uses + 1, last_used=now)
        return entry

    def drop(self, generation: int, leased: Leased) -> None:
        """Forget an entry. Its memory is free again, or kept back for as long as somebody has it."""
        self._let_go(self._entries.pop(generation).extents, leased)

    def reclaim(self, leased: Leased) -> None:
        """Free what was kept back and is no longer leased."""
        kept_back, self._kept_back = self._kept_back, []
        self._let_go(kept_back, leased)

    def _let_go(self, extents: Iterable[Extent], leased: Leased) -> None:
        for extent in extents:
            if not leased((extent,)):
                self._free.give_back(extent)
            elif extent.size_bytes == POOL_BLOCK_BYTES:
                self._kept_back.append(extent)
            else:  # only part of it may be
                half = extent.size_bytes // POOL_BLOCK_BYTES // 2 * POOL_BLOCK_BYTES
                rest = Extent(extent.offset + half, extent.size_bytes - half)
                self._let_go((Extent(extent.offset, half), rest), leased)


def whole_blocks(size_bytes: int) -> int:
    """Return the bytes of the pool that so many bytes take."""
    return max(1, chunks_in(size_bytes, POOL_BLOCK_BYTES)) * POOL_BLOCK_BYTES


def _as_held(entry: Entry, leased: Leased, awaited: Container[int]) -> Held:
    in_use = entry.state is EntryState.LOADING or entry.generation in awaited
    return Held(
        id=entry.generation,
        size_bytes=entry.held_bytes,
        reload_s=entry.reload_s,
        uses=entry.uses,
        last_used=entry.last_used,
        pinned=in_use or leased(entry.extents),
    )
