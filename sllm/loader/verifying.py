"""Reads a whole checkpoint to say whether it is what was written. Blocking; needs no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sllm.errors import CheckpointUnreadable, ChunkCorrupt, ExecutionFileDamaged, PartitionMissing, PartitionTruncated
from sllm.loader.folder import check_sizes, open_file, read_manifest
from sllm.loader.format import Manifest, Partition, StoredFile
from sllm.loader.writing import Meter, Progress

_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found in order: `chunks` and `files` were read, `size_bytes` in all. `deep`: partitions' sha256 too."""

    manifest: Manifest
    chunks: int
    files: int
    size_bytes: int
    deep: bool


def verify(
    path: str | os.PathLike[str],
    *,
    deep: bool = False,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Verified:
    """Check the manifest, each file's length, each chunk's xxh3-64 and each execution file's sha256.

    xxh3 finds damage; `deep` checks the partitions' sha256 too, which nobody can forge, at a tenth of the speed.
    Raises the InvalidCheckpoint or UnsupportedCheckpoint that says what is wrong; Cancelled.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    meter = Meter(manifest.stored_bytes, progress, cancelled)
    for partition in manifest.partitions:
        _verify_partition(folder, partition, manifest.chunk_bytes, deep, meter)
    for file in manifest.execution_files:
        _verify_file(folder, file, meter)
    return Verified(
        manifest=manifest,
        chunks=sum(len(partition.chunks) for partition in manifest.partitions),
        files=len(manifest.execution_files),
        size_bytes=manifest.stored_bytes,
        deep=deep,
    )


def _verify_partition(folder: Path, partition: Partition, chunk_bytes: int, deep: bool, meter: Meter) -> None:
    fd = open_file(folder / partition.file, PartitionMissing)
    sha256 = hashlib.sha256()

    def read(number: int) -> bytes:
        chunk = _read_chunk(fd, number, chunk_bytes, partition)
        if xxhash.xxh3_64_hexdigest(chunk) != partition.chunks[number]:
            raise ChunkCorrupt(f"chunk {number} of {folder / partition.file} is not what was written")
        return chunk

    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="verify")
    try:
        for start in range(0, len(partition.chunks), _THREADS):  # so few, that memory stays bounded
            for chunk in threads.map(read, range(start, min(start + _THREADS, len(partition.chunks)))):
                meter.add(len(chunk))
                if deep:
                    sha256.update(chunk)
    finally:
        threads.shutdown(cancel_futures=True)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if deep and sha256.hexdigest() != partition.sha256:
        raise ChunkCorrupt(f"{folder / partition.file} is not what was written: its sha256 differs")


def _read_chunk(fd: int, number: int, chunk_bytes: int, partition: Partition) -> bytes:
    offset = number * chunk_bytes
    left = min(chunk_bytes, partition.size_bytes - offset)
    pieces = []
    while left:
        try:
            piece = os.pread(fd, left, offset)
        except OSError as error:
            raise CheckpointUnreadable(f"cannot read {partition.file}: {error.strerror}") from error
        if not piece:
            raise PartitionTruncated(f"{partition.file} became shorter while it was read")
        pieces.append(piece)
        left, offset = left - len(piece), offset + len(piece)
    return b"".join(pieces)


def _verify_file(folder: Path, file: StoredFile, meter: Meter) -> None:
    with os.fdopen(open_file(folder / file.path, ExecutionFileDamaged), "rb") as opened:
        try:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointUnreadable(f"cannot read {folder / file.path}: {error.strerror}") from error
    if digest != file.sha256:
        raise ExecutionFileDamaged(f"{folder / file.path} is not what was written: its sha256 differs")
    meter.add(file.size_bytes)
