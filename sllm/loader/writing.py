"""Writes checkpoints: bytes stream in, in load order; out come partitions, their hashes and the manifest. Blocking.

Memory is bounded: a few buffers of one chunk each. While one fills, the one before it is hashed (xxh3-64 of the chunk,
sha256 of the partition) in one thread and written in another, past the page cache where the file system allows it.
A partition's room is reserved before its first byte, so that a full disk is known at once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Self

import xxhash

from sllm.errors import Cancelled, CapacityExceeded, InvalidArgument, SllmError
from sllm.failpoints import failpoint
from sllm.loader.format import (
    MANIFEST,
    Manifest,
    ModelFacts,
    Partition,
    StoredFile,
    Tensor,
    chunk_bytes_for,
    is_file_name,
    parse,
    to_bytes,
)
from sllm.loader.work_folder import WorkFolder

# Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]

_BUFFERS = 4  # one fills, one is hashed, one is written, one waits for the slower of the two
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Meter:
    """Counts what is done of `total_bytes`; every step is a place where the work can be called off."""

    def __init__(
        self, total_bytes: int, progress: Progress | None = None, cancelled: Callable[[], bool] | None = None
    ) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._cancelled = cancelled
        self._done_bytes = 0

    def add(self, count_bytes: int) -> None:
        """Raises Cancelled."""
        if self._cancelled and self._cancelled():
            raise Cancelled("the work was called off")
        self._done_bytes += count_bytes
        if self._progress:
            self._progress(self._done_bytes, self._total_bytes)


@dataclass(frozen=True, slots=True)
class _Threads:
    """One of each: hashes go in order, and so do writes."""

    hasher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="hash"))
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="write"))

    def end(self) -> None:
        """Drop what has not begun, and wait for the rest."""
        for executor in (self.hasher, self.writer):
            executor.shutdown(cancel_futures=True)


class PartitionWriter:
    """Takes a partition's bytes from its first to its last. `fd` None: they are hashed, and not kept."""

    def __init__(
        self, fd: int | None, size_bytes: int, buffers: Sequence[memoryview], threads: _Threads, meter: Meter
    ) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._buffers = buffers
        self._pending: list[list[Future[None]]] = [[] for _ in buffers]
        self._threads = threads
        self._meter = meter
        self._sha256 = hashlib.sha256()
        self._chunks: list[str] = []
        self._current = 0
        self._start = 0  # of the chunk that is being filled, in the partition
        self._filled = 0  # of it

    @property
    def position(self) -> int:
        """Where in the partition the next byte goes."""
        return self._start + self._filled

    def room(self) -> memoryview:
        """Return where the next bytes go, up to the end of their chunk: nothing only if the partition is full."""
        return self._buffers[self._current][self._filled : self._chunk_length]

    def advance(self, count: int) -> None:
        """Say that `count` bytes of `room()` are filled. Raises Cancelled; OSError, also of an earlier chunk."""
        self._filled += count
        if self._filled == self._chunk_length and self._filled:
            self._pass_on()

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes. Raises as `advance`."""
        left = memoryview(data)
        while left:
            room = self.room()
            count = min(len(left), len(room))
            room[:count] = left[:count]
            left = left[count:]
            self.advance(count)

    def skip_to(self, offset: int) -> None:
        """Append zeros up to `offset`. Raises as `advance`."""
        while self.position < offset:
            room = self.room()[: offset - self.position]
            room[:] = bytes(len(room))
            self.advance(len(room))

    def finish(self, file: str) -> Partition:
        """Fill the rest with zeros, and wait until all is on the disk. Raises as `advance`."""
        self.skip_to(self._size_bytes)
        for index in range(len(self._buffers)):
            self._settle(index)
        if self._fd is not None:
            os.fsync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            failpoint("write-partition")
        return Partition(
            file=file, size_bytes=self._size_bytes, sha256=self._sha256.hexdigest(), chunks=tuple(self._chunks)
        )

    @property
    def _chunk_length(self) -> int:
        return min(len(self._buffers[0]), self._size_bytes - self._start)

    def _pass_on(self) -> None:
        chunk = self._buffers[self._current][: self._filled]
        futures = [self._threads.hasher.submit(self._hash, chunk)]
        if self._fd is not None:
            futures.append(self._threads.writer.submit(_write_at, self._fd, chunk, self._start))
        self._pending[self._current] = futures
        self._start += self._filled
        self._filled = 0
        self._current = (self._current + 1) % len(self._buffers)
        self._settle(self._current)
        self._meter.add(len(chunk))

    def _hash(self, chunk: memoryview) -> None:
        self._chunks.append(xxhash.xxh3_64_hexdigest(chunk))
        self._sha256.update(chunk)

    def _settle(self, index: int) -> None:
        """Wait until a buffer is free."""
        for future in self._pending[index]:
            future.result()
        self._pending[index] = []


class CheckpointWriter:
    """Writes one checkpoint, which is at `path` once `commit` has returned, and not at all before.

        with CheckpointWriter(path, [size_bytes]) as writer:
            with writer.partition() as partition:
                partition.skip_to(offset)
                partition.write(data)
            manifest = writer.commit(tensors)

    `partition_bytes` are the partitions' lengths, each a multiple of PAGE_BYTES (see `format.place`). What is at `path`
    is replaced if it is nothing but a checkpoint, or `replace_anything`. `path` None: all is hashed, nothing written.
    Raises CapacityExceeded when the disk is full, at any step; Conflict, NotFound, SllmError; Cancelled from `meter`.
    """

    def __init__(
        self,
        path: Path | None,
        partition_bytes: Sequence[int],
        meter: Meter | None = None,
        *,
        chunk_bytes: int | None = None,
        replace_anything: bool = False,
    ) -> None:
        self._sizes = tuple(partition_bytes)
        self._chunk_bytes = chunk_bytes or chunk_bytes_for(max(self._sizes))
        self._meter = meter or Meter(sum(self._sizes))
        self.partitions: list[Partition] = []
        self._files: list[StoredFile] = []
        self._buffers = [memoryview(mmap.mmap(-1, self._chunk_bytes)) for _ in range(_BUFFERS)]
        self._path = str(path)
        self._threads = _Threads()
        with _writing(self._path):
            self._work = WorkFolder(path, replace_anything) if path is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.end()
        if self._work:
            self._work.discard()
            self._work.close()

    @contextmanager
    def partition(self) -> Iterator[PartitionWriter]:
        """Write the next partition."""
        number = len(self.partitions)
        file, size = f"partition-{number:03d}.bin", self._sizes[number]
        with _writing(self._path), self._opened(file, size) as fd:
            writer = PartitionWriter(fd, size, self._buffers, self._threads, self._meter)
            try:
                yield writer
                self.partitions.append(writer.finish(file))
            except BaseException:
                self._threads.end()  # before the file is closed under them
                raise

    def add_file(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write an execution file. Raises InvalidArgument for a name that it cannot have."""
        if not is_file_name(name):
            raise InvalidArgument(f"an execution file cannot have the name {name[:80]!r}")
        digest, size = hashlib.sha256(), 0
        with _writing(self._path), self._created(name) as file:
            for piece in pieces:
                digest.update(piece)
                size += len(piece)
                file.write(piece)
                self._meter.add(len(piece))
            file.flush()
            if self._work:
                os.fsync(file.fileno())
        self._files.append(StoredFile(path=name, size_bytes=size, sha256=digest.hexdigest()))

    def commit(
        self,
        tensors: Mapping[str, Tensor],
        *,
        layout: str = "hf",
        key: Mapping[str, str] | None = None,
        model: ModelFacts | None = None,
        source: str = "",
        created_at: float = 0.0,
        approve: Callable[[Manifest], None] | None = None,
    ) -> Manifest:
        """Write the manifest, flush everything and let the checkpoint appear; return its manifest, digest included.

        `approve` sees it before; if it raises, nothing appears. Raises ValueError if partitions are missing, and as
        `format.parse` if the tensors do not lie in them.
        """
        if len(self.partitions) != len(self._sizes):
            raise ValueError(f"{len(self.partitions)} of {len(self._sizes)} partitions are written")
        manifest = parse(
            to_bytes(
                Manifest(
                    partitions=tuple(self.partitions),
                    tensors=tensors,
                    chunk_bytes=self._chunk_bytes,
                    layout=layout,
                    key=key or {},
                    model=model,
                    execution_files=tuple(sorted(self._files, key=lambda file: file.path)),
                    source=source,
                    created_at=created_at,
                )
            )
        )
        if approve:
            approve(manifest)
        if self._work:
            with _writing(self._path):
                self._publish(self._work, to_bytes(manifest))
        return manifest

    def _publish(self, work: WorkFolder, manifest: bytes) -> None:
        failpoint("write-files")
        with self._created(MANIFEST) as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        failpoint("write-manifest")
        work.publish()

    @contextmanager
    def _opened(self, file: str, size_bytes: int) -> Iterator[int | None]:
        if self._work is None:
            yield None
            return
        fd = _open_direct(self._work.path / file)
        try:
            _reserve(fd, size_bytes)
            failpoint("write-allocated")
            yield fd
        finally:
            os.close(fd)

    def _created(self, name: str) -> BinaryIO:
        return open(self._work.path / name, "xb") if self._work else BytesIO()


def _open_direct(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # some file systems make the file and then refuse
    return os.open(path, flags, 0o666)


def _reserve(fd: int, size_bytes: int) -> None:
    try:
        if size_bytes:
            os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        # Not every file system can; what the C library does then, it cannot do with O_DIRECT.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        try:
            count = os.pwrite(fd, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _without_direct(fd):
                raise
            continue
        data, offset = data[count:], offset + count
    failpoint("write-chunk")


def _without_direct(fd: int) -> bool:
    """Turn O_DIRECT off: for a file system that refuses only at the write, and after a short write. False: it is."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)


@contextmanager
def _writing(name: str) -> Iterator[None]:
    """Say what the operating system's errors mean here."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise CapacityExceeded(
                f"the disk is full: {name} was not written", hint="remove checkpoints that are not needed"
            ) from error
        raise SllmError(f"cannot write {name}: {error.strerror}") from error
