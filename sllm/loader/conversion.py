"""Makes a checkpoint of a folder of safetensors, or a copy of a checkpoint: streams, with a few chunks of memory.

Blocking.
Tensors keep the order of their shards and offsets, so that a load reads them in the order in which models are built.
The same source always gives the same digest. The folder is distrusted: see `source.examine`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from sllm.errors import ChunkCorrupt, ExecutionFileDamaged, InvalidCheckpoint, ManifestMalformed, NotFound
from sllm.loader.folder import checked_path, open_regular
from sllm.loader.format import Manifest, Partition, Tensor, contiguous, place
from sllm.loader.source import Source, SourceFile, examine
from sllm.loader.writing import CheckpointWriter, Meter, PartitionWriter, Progress

_PIECE_BYTES = 1 << 20


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Manifest:
    """Write the checkpoint `destination` from the folder `source`, and return its manifest.

    A `source` of our own format is copied, and verified as it is read.

    A checkpoint that is there is replaced in one step. `progress(done_bytes, total_bytes)` is called for every chunk;
    `cancelled()` is asked as often. Raises NotFound, InvalidCheckpoint or UnsupportedCheckpoint if the source is wrong,
    CapacityExceeded if the disk is full, Conflict if the destination is something else,
    InvalidArgument for what is no path, Cancelled.
    """
    folder, made = Path(os.path.realpath(checked_path(source))), checked_path(destination)
    if not folder.is_dir():
        raise NotFound(f"source {folder} is no folder")
    # Links may lead from a snapshot to its cache, wherever that is, and nowhere else.
    found = examine(folder, [Path("/")], need_config=False)
    return convert_examined(found, made, origin=str(folder), progress=progress, cancelled=cancelled)


def convert_examined(
    source: Source,
    destination: Path | None,
    *,
    origin: str = "",
    now: float | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    approve: Callable[[Manifest], None] | None = None,
    replace_anything: bool = False,
) -> Manifest:
    """Convert a source that was examined; without a destination, only find out what the manifest would be.

    `approve` and `replace_anything` are CheckpointWriter's. Raises as `convert`.
    """
    sizes = _partition_bytes(source)
    meter = Meter(converted_bytes(source), progress, cancelled)
    chunk_bytes = source.manifest.chunk_bytes if source.manifest else None
    with CheckpointWriter(
        destination, sizes, meter, chunk_bytes=chunk_bytes, replace_anything=replace_anything
    ) as writer:
        tensors = _copy_tensors(source, writer) if source.manifest is None else _copy_checkpoint(source, writer)
        for file in source.execution_files:
            writer.add_file(file.path, _pieces(file))
        return writer.commit(
            tensors,
            model=source.facts,
            source=origin.encode("utf-8", "backslashreplace").decode(),  # a path may be any bytes
            created_at=time.time() if now is None else now,
            approve=lambda manifest: _approve(source, manifest, approve),
        )


def converted_bytes(source: Source) -> int:
    """Return what a source takes as a checkpoint, the manifest aside."""
    return sum(_partition_bytes(source)) + sum(file.size_bytes for file in source.execution_files)


def _partition_bytes(source: Source) -> list[int]:
    if source.manifest:
        return [partition.size_bytes for partition in source.manifest.partitions]
    return [place(tensor.size_bytes for tensor in source.tensors)[1]]


def _approve(source: Source, manifest: Manifest, approve: Callable[[Manifest], None] | None) -> None:
    expected = source.manifest
    if expected and manifest.execution_files != expected.execution_files:
        raise ExecutionFileDamaged("an execution file of the source is not what was written")
    if expected and manifest.digest != expected.digest:
        raise ManifestMalformed("the source's manifest is not written in the one way that the format allows")
    if approve:
        approve(manifest)


def _copy_checkpoint(source: Source, writer: CheckpointWriter) -> Mapping[str, Tensor]:
    manifest = source.manifest
    assert manifest is not None
    for file, expected in zip(source.shards, manifest.partitions, strict=True):
        with writer.partition() as partition, _opened(file) as fd:
            _copy(fd, file.path, 0, file.size_bytes, partition)
        _check_same(file, expected, writer.partitions[-1])
    return manifest.tensors


def _check_same(file: SourceFile, expected: Partition, found: Partition) -> None:
    for number, (one, other) in enumerate(zip(expected.chunks, found.chunks, strict=True)):
        if one != other:
            raise ChunkCorrupt(f"chunk {number} of {file.real} is not what was written")
    if expected.sha256 != found.sha256:
        raise ChunkCorrupt(f"{file.real} is not what was written: its sha256 differs")


def _copy_tensors(source: Source, writer: CheckpointWriter) -> Mapping[str, Tensor]:
    offsets, _ = place(tensor.size_bytes for tensor in source.tensors)
    rows = list(zip(source.tensors, offsets, strict=True))
    shards = {shard.path: shard for shard in source.shards}
    with writer.partition() as partition:
        for name, group in groupby(rows, key=lambda row: row[0].shard):
            with _opened(shards[name]) as fd:
                for tensor, offset in group:
                    partition.skip_to(offset)
                    _copy(fd, tensor.shard, tensor.offset, tensor.size_bytes, partition)
    return {
        tensor.name: Tensor(0, offset, tensor.size_bytes, tensor.dtype, tensor.shape, contiguous(tensor.shape))
        for tensor, offset in rows
    }


@contextmanager
def _opened(file: SourceFile) -> Iterator[int]:
    fd = open_regular(file.real)
    try:
        yield fd
    finally:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # it is not read again
        os.close(fd)


def _copy(fd: int, name: str, offset: int, size_bytes: int, partition: PartitionWriter) -> None:
    end = offset + size_bytes
    while offset < end:
        count = _read(fd, partition.room()[: end - offset], offset, name)
        partition.advance(count)
        offset += count


def _read(fd: int, room: memoryview, offset: int, name: str) -> int:
    try:
        count = os.preadv(fd, [room], offset)
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {name}: {error.strerror}") from error
    if count == 0:
        raise InvalidCheckpoint(f"{name} became shorter while it was read", hint="copy it again")
    return count


def _pieces(file: SourceFile) -> Iterator[bytes]:
    with os.fdopen(open_regular(file.real), "rb", buffering=0) as opened:
        try:
            while piece := opened.read(_PIECE_BYTES):
                yield piece
        except OSError as error:
            raise InvalidCheckpoint(f"cannot read {file.path}: {error.strerror}") from error
