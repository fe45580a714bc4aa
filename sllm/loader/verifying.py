"""Reads a whole checkpoint to say whether it is what was written. Blocking; needs no torch."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from sllm.errors import ChunkCorrupt, ExecutionFileDamaged, SllmError
from sllm.loader.folder import cannot_read, check_sizes, checked_path, open_regular, read_manifest
from sllm.loader.format import Manifest, Partition, StoredFile
from sllm.loader.reading import ChunkReader
from sllm.loader.storage.direct import DirectFile
from sllm.loader.writing import Meter, Progress

_SLOTS = 8  # chunks in memory: two for each reading thread


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
    Raises the InvalidCheckpoint or UnsupportedCheckpoint that says what is wrong; InvalidArgument, Cancelled.
    """
    folder = checked_path(path)
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
    sha256 = hashlib.sha256()
    with (
        DirectFile(folder / partition.file, partition.size_bytes) as file,
        closing(_verified_chunks(file, partition, chunk_bytes)) as chunks,
    ):
        for chunk in chunks:
            if deep:
                sha256.update(chunk)
            meter.add(len(chunk))
    if deep and sha256.hexdigest() != partition.sha256:
        raise ChunkCorrupt(f"{folder / partition.file} is not what was written: its sha256 differs")


def _verified_chunks(file: DirectFile, partition: Partition, chunk_bytes: int) -> Generator[memoryview, None, None]:
    """Yield each chunk, which is good until the next is asked for."""
    slots = min(_SLOTS, max(1, len(partition.chunks)))
    memory = memoryview(mmap.mmap(-1, slots * chunk_bytes))

    def place(number: int) -> memoryview:
        start = number % slots * chunk_bytes
        return memory[start : start + chunk_bytes]

    reader = ChunkReader(file, chunk_bytes=chunk_bytes, hashes=partition.chunks, place=place, slots=slots)
    reader.start()
    try:
        for number in range(reader.chunks):
            if not reader.wait_for(number + 1):
                break
            yield place(number)[: partition.size_bytes - number * chunk_bytes]
            reader.taken(number + 1)
    except GeneratorExit:  # whoever asked has failed, and wants no second error
        reader.cancel()
        with suppress(SllmError):
            reader.wait()
        raise
    reader.wait()


def _verify_file(folder: Path, file: StoredFile, meter: Meter) -> None:
    with os.fdopen(open_regular(folder / file.path, ExecutionFileDamaged), "rb") as opened:
        try:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise cannot_read(folder / file.path, error, ExecutionFileDamaged) from error
    if digest != file.sha256:
        raise ExecutionFileDamaged(f"{folder / file.path} is not what was written: its sha256 differs")
    meter.add(file.size_bytes)
