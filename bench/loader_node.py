"""A node's DRAM pool without its processes: table, shared memory, readers and mapping are the product's.

What the store process does (decide what goes, read, verify) and what an engine host does (map a lease, make tensors)
happen in one process here, so that one clock measures both. Left out: the queue, the sockets between them, the fork.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing
from pathlib import Path

from loader_checkpoints import Tensors

from sllm.agent.store.load import places
from sllm.core.grant import chunks_in
from sllm.loader.folder import read_manifest
from sllm.loader.format import Manifest
from sllm.loader.memory import space
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.space import Space
from sllm.loader.memory.table import Entry, Table
from sllm.loader.reading import ChunkReader
from sllm.loader.storage.direct import DirectFile
from sllm.loader.views import bytes_of, tensors_on


class NodePool:
    """A pool of `size_bytes`, for checkpoints of one partition; of huge pages if they are free, as the product's."""

    def __init__(self, size_bytes: int) -> None:
        self._pool = SharedPool.create(size_bytes, hugepages=True)
        self._pool.prefault(lock=False, stopped=threading.Event())
        self._table = Table(self._pool.size_bytes, generation=1)

    def holds(self, folder: Path) -> bool:
        """Whether a load would not read."""
        return self._table.find(read_manifest(folder).digest, 0) is not None

    def load(self, folder: Path) -> Tensors:
        """Return a checkpoint's tensors. What they lie in stays leased until the last of them is gone."""
        manifest = read_manifest(folder)
        held = self._table.find(manifest.digest, 0)
        entry = held or self._placed(folder, manifest)
        memory = self._leased(entry)
        if held:
            space.populate(memory, write=False)
        else:
            self._read(folder, manifest, entry, memory)
        self._table.use(entry.generation, time.monotonic())
        return tensors_on(bytes_of(memory.buffer), manifest.tensors)

    def _placed(self, folder: Path, manifest: Manifest) -> Entry:
        (partition,) = manifest.partitions
        now = time.monotonic()
        victims = self._table.victims(partition.size_bytes, now, self._pool.leased)
        if victims is None:
            raise MemoryError("all of the pool is in use")
        for victim in victims:
            self._table.drop(victim.generation, self._pool.leased)
        return self._table.add(
            digest=manifest.digest,
            partition=0,
            checkpoint=manifest.digest,
            folder=str(folder),
            size_bytes=partition.size_bytes,
            chunk_bytes=manifest.chunk_bytes,
            slots=chunks_in(partition.size_bytes, manifest.chunk_bytes),
            now=now,
        )

    def _leased(self, entry: Entry) -> Space:
        lease = self._pool.lease(entry.extents)
        try:
            return space.map_extents(lease, entry.extents)
        finally:
            os.close(lease)  # the mapping keeps it

    def _read(self, folder: Path, manifest: Manifest, entry: Entry, memory: Space) -> None:
        """Read and verify all chunks, and map the pages of each as it comes, as an engine host does."""
        (partition,) = manifest.partitions
        began = time.monotonic()
        with closing(DirectFile(folder / partition.file, partition.size_bytes)) as file:
            place = places(self._pool, entry)
            reader = ChunkReader(file, chunk_bytes=entry.chunk_bytes, hashes=partition.chunks, place=place)
            reader.start()
            for start in range(0, entry.size_bytes, entry.chunk_bytes):
                end = min(start + entry.chunk_bytes, entry.size_bytes)
                if not reader.wait_for(chunks_in(end, entry.chunk_bytes)):
                    break
                space.populate(memory, write=False, offset=start, size_bytes=end - start)
            reader.wait()
        self._table.ready(entry.generation, time.monotonic() - began)
