"""One load: a partition on its way from SSD into the pool, and all who wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sllm.agent.store.channel import Channel
from sllm.agent.store.feed import Feed
from sllm.agent.store.protocol import Open, Refused
from sllm.core.grant import POOL_CHUNK_BYTES
from sllm.errors import SllmError
from sllm.failpoints import failpoint
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import Entry
from sllm.loader.reading import ChunkReader
from sllm.loader.storage.base import PartitionBytes

OpenSource = Callable[[Path, int], PartitionBytes]  # (path, size in bytes): may block; raises InvalidCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asker:
    """An Open that has no answer yet. `since` is when it came, in monotonic time."""

    channel: Channel
    request: Open
    since: float

    def refuse(self, error: SllmError) -> None:
        refused = Refused(id=self.request.id, reason=error.reason, message=error.message, hint=error.hint)
        self.channel.send(refused)


class Load:
    """Belongs to the event loop; only `read` is for a thread."""

    def __init__(self, asker: Asker) -> None:
        self.request = asker.request
        self.since = asker.since
        self.askers = [asker]
        self.feeds: list[Feed] = []
        self.entry: Entry | None = None
        self.ready_chunks = 0
        self.called_off = False
        self.late: list[Asker] = []  # came while it was being called off: they begin anew
        self._reader: ChunkReader | None = None
        self._loop = asyncio.get_running_loop()
        self._telling = False

    @property
    def key(self) -> tuple[str, int]:
        return self.request.digest, self.request.partition

    @property
    def is_wanted(self) -> bool:
        return bool(self.askers) or any(not feed.over for feed in self.feeds)

    def taken(self, chunks: int) -> None:
        """The reader of a ring has copied so many out."""
        if self._reader is not None and self.entry is not None and self.entry.is_ring:
            self._reader.taken(min(chunks, self.ready_chunks))

    def call_off(self) -> None:
        """Stop at the next chunk."""
        self.called_off = True
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
            )
            self._reader.read()

    def finish(self, chunks: int) -> None:
        for feed in self.feeds:
            feed.finish(chunks)

    def fail(self, error: SllmError) -> None:
        for asker in self.askers:
            asker.refuse(error)
        self.askers.clear()
        for feed in self.feeds:
            feed.fail(error)

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
        extent.offset + start for extent in entry.extents for start in range(0, extent.size_bytes, POOL_CHUNK_BYTES)
    ]
    per_pool_chunk = POOL_CHUNK_BYTES // entry.chunk_bytes

    def place(chunk: int) -> memoryview:
        number, within = divmod(chunk % entry.slots, per_pool_chunk)
        return pool.view(offsets[number] + within * entry.chunk_bytes, entry.chunk_bytes)

    return place
