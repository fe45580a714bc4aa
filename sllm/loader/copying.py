"""Copies files durably, hashing as it goes. Blocking."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sllm.errors import Cancelled
from sllm.loader.manifest import StoredFile
from sllm.loader.source import SourceFile, open_regular

CHUNK_BYTES = 8 << 20

# Called with the bytes done so far; raising from it (`Cancelled`) ends the copy.
Progress = Callable[[int], None]


def cancelling(cancelled: Callable[[], bool], progress: Progress) -> Progress:
    """Return `progress` that raises Cancelled once `cancelled()` is true."""

    def report(done_bytes: int) -> None:
        if cancelled():
            raise Cancelled("the copy was cancelled")
        progress(done_bytes)

    return report


def copy_files(files: Sequence[SourceFile], folder: Path | None, progress: Progress) -> tuple[StoredFile, ...]:
    """Copy files into `folder`, each flushed, and return what they are; without a folder only read them."""
    done = 0
    copied = []
    for file in files:

        def report(in_file: int, before: int = done) -> None:
            progress(before + in_file)

        copied.append(_copy(file, folder, report))
        done += copied[-1].size_bytes
    return tuple(copied)


def _copy(file: SourceFile, folder: Path | None, progress: Progress) -> StoredFile:
    with os.fdopen(open_regular(file.real), "rb", buffering=0) as source:
        if folder is None:
            digest, size = _pump(source.fileno(), None, progress)
        else:
            with open(folder / file.path, "xb", buffering=0) as target:
                digest, size = _pump(source.fileno(), target.fileno(), progress)
                os.fsync(target.fileno())
    return StoredFile(path=file.path, size_bytes=size, sha256=digest)


def _pump(source: int, target: int | None, progress: Progress) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while piece := os.read(source, CHUNK_BYTES):
        digest.update(piece)
        if target is not None:
            _write_all(target, piece)
        size += len(piece)
        progress(size)
    return digest.hexdigest(), size


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def write_flushed(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush a folder's entries (a rename into it, say) to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
