"""What the pool holds: its table and its memory together, and each change told to the agents."""

from __future__ import annotations

import time
from collections.abc import Callable, Container

from sllm.agent.store import protocol
from sllm.agent.store.protocol import Message, Open
from sllm.core.grant import chunks_in
from sllm.errors import Unavailable
from sllm.failpoints import failpoint
from sllm.loader.format import Manifest
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import Entry, Table

_RING_SLOTS = 8  # chunks in flight of a partition that has no room: enough for all reading threads, twice over


class Content:
    """Belongs to the event loop. `tell` says something to all agents."""

    def __init__(self, pool: SharedPool, table: Table, tell: Callable[[Message], None]) -> None:
        self.pool = pool
        self.table = table
        self.tell = tell
        self._told_kept_bytes = table.kept_back_bytes

    def has_room(self, request: Open, manifest: Manifest, awaited: Container[int]) -> bool:
        """Return whether `take` would find room for all of a partition."""
        size_bytes = manifest.partitions[request.partition].size_bytes
        return self.table.victims(size_bytes, time.monotonic(), self.pool.leased, awaited) is not None

    def take(self, request: Open, manifest: Manifest, awaited: Container[int]) -> Entry:
        """Take memory for a partition, or for a ring where there is too little; what must go for it goes.

        `awaited` has the generations that somebody waits for, which stay. Raises Unavailable while not even a ring
        has room.
        """
        size_bytes, chunk_bytes = manifest.partitions[request.partition].size_bytes, manifest.chunk_bytes
        slots, victims = self._room(size_bytes, chunk_bytes, awaited)
        for victim in victims:
            self.drop(victim)
            failpoint("in-evict")
        entry = self.table.add(
            digest=request.digest,
            partition=request.partition,
            checkpoint=request.checkpoint,
            folder=request.folder,
            size_bytes=size_bytes,
            chunk_bytes=chunk_bytes,
            slots=slots,
            now=time.monotonic(),
        )
        self.tell(protocol.Holds(entry=entry.as_json()))
        self._tell_kept()
        return entry

    def use(self, entry: Entry) -> None:
        """It is granted to somebody."""
        self.tell(protocol.Holds(entry=self.table.use(entry.generation, time.monotonic()).as_json()))

    def ready(self, entry: Entry, read_s: float | None = None) -> None:
        """It is there and verified. `read_s` is what reading it took, if it was read."""
        self.tell(protocol.Holds(entry=self.table.ready(entry.generation, read_s).as_json()))

    def drop(self, entry: Entry) -> None:
        """Forget it. Memory that is leased is given to nobody while it is."""
        self.table.drop(entry.generation, self.pool.leased)
        self.tell(protocol.Gone(generation=entry.generation))
        self._tell_kept()

    def look(self) -> None:
        """See whether leases have ended since, which nobody tells, on memory whose entry is gone."""
        self.table.reclaim(self.pool.leased)
        self._tell_kept()

    def _tell_kept(self) -> None:
        kept_bytes = self.table.kept_back_bytes
        if kept_bytes != self._told_kept_bytes:
            self._told_kept_bytes = kept_bytes
            self.tell(protocol.Kept(kept_back_bytes=kept_bytes))

    def _room(self, size_bytes: int, chunk_bytes: int, awaited: Container[int]) -> tuple[int, tuple[Entry, ...]]:
        """Return for how many chunks there is room, and what must go for it."""
        now, leased = time.monotonic(), self.pool.leased
        slots, victims = chunks_in(size_bytes, chunk_bytes), self.table.victims(size_bytes, now, leased, awaited)
        if victims is None:
            slots = self.table.ring_slots(chunk_bytes, min(_RING_SLOTS, slots), now, leased, awaited)
            victims = self.table.victims(slots * chunk_bytes, now, leased, awaited) if slots else None
        if victims is None:
            raise Unavailable(
                f"all {self.pool.size_bytes} bytes of the pool are in use",
                hint="it is tried again; stop replicas on this node, or give it a larger pool: [store] dram_bytes",
            )
        return slots, victims
