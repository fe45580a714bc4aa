"""Is memory that was inherited still what its manifest says? Nothing else tells whether a process that died, or one
that outlived it, has written there."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from sllm.agent.store.load import places
from sllm.errors import SllmError
from sllm.loader.folder import read_manifest
from sllm.loader.format import Partition
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import Entry

log = logging.getLogger(__name__)


def is_intact(pool: SharedPool, entry: Entry, threads: int) -> bool:
    """Compare every chunk with the manifest on SSD (25 GB/s per thread: give it one). False if that is gone."""
    try:
        partition = _partition_of(entry)
    except (SllmError, IndexError) as error:
        log.warning("%s cannot be verified: %s", entry.folder, error)
        return False
    if partition is None or len(partition.chunks) != entry.chunks:
        return False
    place = places(pool, entry)

    def is_whole(chunk: int) -> bool:
        length = min(entry.chunk_bytes, entry.size_bytes - chunk * entry.chunk_bytes)
        return xxhash.xxh3_64_hexdigest(place(chunk)[:length]) == partition.chunks[chunk]

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as executor:
        return all(executor.map(is_whole, range(entry.chunks)))


def _partition_of(entry: Entry) -> Partition | None:
    manifest = read_manifest(Path(entry.folder))
    partition = manifest.partitions[entry.partition]
    same = (manifest.digest, manifest.chunk_bytes, partition.size_bytes)
    return partition if same == (entry.digest, entry.chunk_bytes, entry.size_bytes) else None
