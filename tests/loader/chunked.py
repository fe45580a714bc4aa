"""Chunks for the tests of reading: what a partition holds, its hashes, and a reader that puts it into memory."""

from __future__ import annotations

import os

import xxhash

from sllm.loader.memory import space
from sllm.loader.reading import ChunkReader
from sllm.loader.storage.base import PartitionBytes

CHUNK = 64 << 10
DATA = os.urandom(10 * CHUNK + 4096)
CHUNKS = 11


def hashes(data: bytes) -> list[str]:
    return [xxhash.xxh3_64_hexdigest(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)]


def load(source: PartitionBytes, data: bytes = DATA, **options: object) -> bytes:
    """Read a source into memory; return what the memory holds."""
    memory = space.anonymous(source.size_bytes)
    view = memory.view()
    reader = ChunkReader(
        source,
        chunk_bytes=CHUNK,
        **{"hashes": hashes(data), "place": lambda chunk: view[chunk * CHUNK :], **options},  # type: ignore[arg-type]
    )
    reader.read()
    return bytes(view)
