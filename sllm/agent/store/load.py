"""One load: a partition on its way from SSD into the pool, and all who wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from sllm.agent.store.askers import Asker
from sllm.agent.store.feed import Feed
from sllm.core.grant import POOL_BLOCK_BYTES
from sllm.errors import SllmError
from sllm.failpoints import failpoint
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import Entry
from sllm.loader.reading import ChunkReader
from sllm.loader.storage.base import PartitionBytes

OpenSource = Callable[[Path, int], PartitionBytes]  # (path, size in bytes): may block; raises InvalidCheckpoint


class Load:
    """Belongs to the event loop; only `read` is for a thread.

    `turn` is set while it is its turn to read; without it, it rests at its next chunk, and keeps what it has.
    """

    def __init__(self, asker: Asker) -> None:
        self.request = asker.request
        self.since = asker.since
        self.turn = asyncio.Event()
        self.under_way = False  # it has had a turn
        self.askers = [asker]
        self.feeds: list[Feed] = []
        self.entry: Entry | None = None
        self.ready_chunks = 0
        self.taken_chunks = 0
        self.called_off = False
        self.forgotten = False  # who has been granted it keeps it, nobody else is to get it
        self.late: list[Asker] = []  # came while it was being called off: they begin anew
        self._reader: ChunkReader | None = None
        self._turn_began = 0.0
        self._turns_s = 0.0  # of its turns that are over
        self._loop = asyncio.get_running_loop()
        self._telling = False

    @property
    def key(self) -> tuple[str, int]:
        return self.request.digest, self.request.partition

    @property
    def is_wanted(self) -> bool:
        return any(asker.is_waiting for asker in self.askers) or any(not feed.over for feed in self.feeds)

    @property
    def is_full(self) -> bool:
        """True if nothing can be read before the reader of a ring takes some."""
        return self.entry is not None and self.ready_chunks - self.taken_chunks >= self.entry.slots

    @property
    def read_s(self) -> float:
        """Seconds of its turns until now: what it rested between them does not count."""
        return self._turns_s + (time.monotonic() - self._turn_began if self.turn.is_set() else 0.0)

    def go_on(self) -> None:
        """It is its turn."""
        self._turn_began = time.monotonic()
        self.turn.set()
        self._look_again()

    def rest(self) -> None:
        """Its turn is interrupted."""
        self._turns_s = self.read_s
        self.turn.clear()
        self._look_again()

    def taken(self, chunks: int) -> None:
        """The reader of a ring has copied so many out."""
        if self._reader is not None and self.entry is not None and self.entry.is_ring:
            self.taken_chunks = max(self.taken_chunks, min(chunks, self.ready_chunks))
            self._reader.taken(self.taken_chunks)

    def call_off(self) -> None:
        """Stop at the next chunk, or where it waits for its turn."""
        self.called_off = True
        self.turn.set()
        if self._reader is not None:
            self._reader.cancel()

    def read(self, pool: SharedPool, entry: Entry, source: PartitionBytes, hashes: Sequence[str], threads: int) -> None:
        """Read all chunks into the entry's place, and close the source. Raises what ChunkReader does.

        Takes its time: give it a thread.
        """
        with closing(source):
            self._reader = ChunkReader(
                source,
                chunk_bytes=entry.chunk_bytes,
                hashes=hashes,
                place=places(pool, entry),
                slots=entry.slots if entry.is_ring else None,
                threads=threads,
                on_ready=self._on_ready,
                cancelled=lambda: self.called_off,
                paused=lambda: not self.turn.is_set(),
            )
            self._reader.read()

    def finish(self, chunks: int) -> None:
        for feed in self.feeds:
            feed.finish(chunks)

    def fail(self, error: SllmError) -> None:
        for asker in self.askers:
            asker.refuse(error)
        for feed in self.feeds:
            feed.fail(error)

    def _look_again(self) -> None:
        if self._reader is not None:  # one that is made later sees it when it begins
            self._reader.look_again()

    def _on_ready(self, chunks: int) -> None:
        """In a reading thread. Several chunks may be told of at once: nothing of this is to hold up reading."""
        self.ready_chunks = chunks
        if self.entry is not None and chunks * 2 >= self.entry.chunks:
            failpoint("mid-read")
        if not self._telling:
            self._telling = True
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._telling = False  # before it looks: what comes later is told later
        for feed in self.feeds:
            feed.ready(self.ready_chunks)


def places(pool: SharedPool, entry: Entry) -> Callable[[int], memoryview]:
    """Return the function from a chunk's number to its memory."""
    offsets = [
        extent.offset + start for extent in entry.extents for start in range(0, extent.size_bytes, POOL_BLOCK_BYTES)
    ]
    per_block = POOL_BLOCK_BYTES // entry.chunk_bytes

    def place(chunk: int) -> memoryview:
        number, within = divmod(chunk % entry.slots, per_block)
        return pool.view(offsets[number] + within * entry.chunk_bytes, entry.chunk_bytes)

    return place
