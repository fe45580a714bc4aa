"""A short measurement of a node's disk, on the store's own files: what its loads are estimated from before the first.

It reads as loads do, past the page cache and with their threads, but into a little memory of its own, and it is bounded
in bytes and in time. It does not take a turn in the loading queue: one load, the first, may be a little slower for it.
"""

from __future__ import annotations

import asyncio
import mmap
import time
from contextlib import suppress
from pathlib import Path

from sllm.agent.changes import Changes
from sllm.core.node import LoadReport
from sllm.core.residency import Tier
from sllm.errors import Cancelled, DeadlineExceeded
from sllm.loader.reading import ChunkReader
from sllm.loader.storage.direct import DirectFile
from sllm.loader.store import SsdStore, StoredCheckpoint

MOST_BYTES = 128 << 20
MOST_S = 0.5
RING_BYTES = 32 << 20


async def first_probe(store: SsdStore, changes: Changes, threads: int) -> LoadReport | None:
    """Measure as soon as the node holds a checkpoint. Returns None where the disk gave nothing in time.

    Raises CheckpointUnreadable and its like.
    """
    while True:
        seen = changes.revision
        if entries := store.entries():
            largest = max(entries, key=lambda entry: entry.checkpoint.size_bytes)
            return await asyncio.to_thread(measured, store.folder(largest), largest, threads)
        await changes.wait_beyond(seen)


def measured(folder: Path, stored: StoredCheckpoint, threads: int) -> LoadReport | None:
    """Read some of a checkpoint's largest partition. Blocking."""
    chunk_bytes = stored.manifest.chunk_bytes
    partition = max(stored.manifest.partitions, key=lambda each: each.size_bytes)
    slots = RING_BYTES // chunk_bytes
    ready, last = 0, 0.0

    def on_ready(chunks: int) -> None:
        nonlocal ready, last
        ready, last = chunks, time.monotonic()
        reader.taken(chunks)

    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE  # its page faults are not the disk's
    with (
        DirectFile(folder / partition.file, partition.size_bytes) as file,
        mmap.mmap(-1, slots * chunk_bytes, flags=flags) as ring,
        memoryview(ring) as memory,
    ):
        began = time.monotonic()
        reader = ChunkReader(
            file,
            chunk_bytes=chunk_bytes,
            hashes=None,
            place=lambda chunk: memory[chunk % slots * chunk_bytes :][:chunk_bytes],
            slots=slots,
            threads=threads,
            on_ready=on_ready,
            cancelled=lambda: ready * chunk_bytes >= MOST_BYTES,
            deadline=began + MOST_S,
        )
        with suppress(Cancelled, DeadlineExceeded):
            reader.read()
    if not ready:
        return None
    size_bytes = min(ready * chunk_bytes, partition.size_bytes)
    digest = stored.checkpoint.digest
    return LoadReport(number=0, digest=digest, size_bytes=size_bytes, tier=Tier.SSD, queue_s=0.0, read_s=last - began)
