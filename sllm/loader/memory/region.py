"""A memfd that holds one checkpoint's tensor bytes, and how it is filled from SSD. Blocking; give `fill` a thread.

Whoever gets the descriptor can map it but not change it: it is sealed once it is full.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sllm.core.launch import TensorEntry
from sllm.errors import Cancelled, InvalidCheckpoint
from sllm.loader.safetensors import StoredTensor
from sllm.loader.source import open_regular

# With 4 threads and chunks of this size plain Python reads as fast as the disk gives (os.preadv releases the GIL).
CHUNK_BYTES = 8 << 20
THREADS = 4
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """`size_bytes` bytes of `shard` from `shard_offset` belong at `offset` of the region."""

    shard: str
    shard_offset: int
    offset: int
    size_bytes: int


def reads(tensors: Sequence[StoredTensor], entries: Sequence[TensorEntry]) -> Iterator[Read]:
    """Yield the chunks to read, in the order of the files."""
    for tensor, entry in zip(tensors, entries, strict=True):
        for start in range(0, tensor.size_bytes, CHUNK_BYTES):
            yield Read(
                shard=tensor.shard,
                shard_offset=tensor.offset + start,
                offset=entry.offset + start,
                size_bytes=min(CHUNK_BYTES, tensor.size_bytes - start),
            )


def create(name: str, size_bytes: int) -> int:
    """Make a region and return its descriptor. `name` is only seen in /proc."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, max(1, size_bytes))
    return fd


def fill(
    fd: int,
    folder: Path,
    chunks: Sequence[Read],
    *,
    progress: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> None:
    """Read all chunks into the region, then seal it. `progress` gets bytes done, from any thread.

    Raises InvalidCheckpoint if a shard is shorter than its manifest says, Cancelled when `cancelled()` turns true.
    """
    with contextlib.ExitStack() as stack:
        shards = {name: open_regular(folder / name) for name in {chunk.shard for chunk in chunks}}
        for shard_fd in shards.values():
            stack.callback(os.close, shard_fd)
        memory = stack.enter_context(mmap.mmap(fd, os.fstat(fd).st_size))
        view = stack.enter_context(memoryview(memory))
        _Filling(view, shards, chunks, progress, cancelled).run()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


class _Filling:
    def __init__(
        self,
        view: memoryview,
        shards: dict[str, int],
        chunks: Sequence[Read],
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._view = view
        self._shards = shards
        self._chunks = chunks
        self._next = itertools.count()  # its `next` is atomic
        self._done = 0
        self._lock = threading.Lock()
        self._progress = progress
        self._cancelled = cancelled
        self._broken = False

    def run(self) -> None:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="read") as threads:
            for outcome in [threads.submit(self._work) for _ in range(THREADS)]:
                outcome.result()

    def _work(self) -> None:
        try:
            while (number := next(self._next)) < len(self._chunks) and not self._broken:
                if self._cancelled():
                    raise Cancelled("the read was cancelled")
                self._read(self._chunks[number])
        except BaseException:
            self._broken = True
            raise

    def _read(self, chunk: Read) -> None:
        done = 0
        while done < chunk.size_bytes:
            with self._view[chunk.offset + done : chunk.offset + chunk.size_bytes] as target:
                count = self._read_some(chunk, done, target)
            if count == 0:
                raise InvalidCheckpoint(f"{chunk.shard} is shorter than when it was added", hint="add it again")
            done += count
        with self._lock:
            self._done += chunk.size_bytes
            self._progress(self._done)

    def _read_some(self, chunk: Read, done: int, target: memoryview) -> int:
        try:
            return os.preadv(self._shards[chunk.shard], [target], chunk.shard_offset + done)
        except OSError as error:  # the disk has lost it
            raise InvalidCheckpoint(f"{chunk.shard} cannot be read: {error.strerror}", hint="add it again") from error
