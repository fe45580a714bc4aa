"""Makes a checkpoint of a folder of safetensors: streams, with a few chunks of memory. Blocking.

Tensors keep the order of their shards and offsets, so that a load reads them in the order in which models are built.
The same source always gives the same digest. The folder is distrusted: see `source.examine`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from sllm.errors import InvalidCheckpoint
from sllm.loader.format import Manifest, Tensor, contiguous, place
from sllm.loader.safetensors import StoredTensor
from sllm.loader.source import Source, SourceFile, examine, open_regular
from sllm.loader.writing import CheckpointWriter, Meter, PartitionWriter, Progress

_PIECE_BYTES = 1 << 20


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Manifest:
    """Write the checkpoint `destination` from the folder `source`, and return its manifest.

    A checkpoint that is there is replaced in one step. `progress(done_bytes, total_bytes)` is called for every chunk;
    `cancelled()` is asked as often. Raises InvalidCheckpoint or UnsupportedCheckpoint if the source is wrong,
    CapacityExceeded if the disk is full, Conflict if the destination is something else, Cancelled.
    """
    found = examine(Path(source).absolute(), need_config=False)
    return convert_examined(found, Path(destination), origin=str(source), progress=progress, cancelled=cancelled)


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
    offsets, size_bytes = place(tensor.size_bytes for tensor in source.tensors)
    meter = Meter(converted_bytes(source), progress, cancelled)
    with CheckpointWriter(destination, [size_bytes], meter, replace_anything=replace_anything) as writer:
        with writer.partition() as partition:
            _copy_tensors(source, offsets, partition)
        for file in source.execution_files:
            writer.add_file(file.path, _pieces(file))
        return writer.commit(
            {
                tensor.name: Tensor(0, offset, tensor.size_bytes, tensor.dtype, tensor.shape, contiguous(tensor.shape))
                for tensor, offset in zip(source.tensors, offsets, strict=True)
            },
            model=source.facts,
            source=origin,
            created_at=time.time() if now is None else now,
            approve=approve,
        )


def converted_bytes(source: Source) -> int:
    """Return what a source takes as a checkpoint, the manifest aside."""
    _, size_bytes = place(tensor.size_bytes for tensor in source.tensors)
    return size_bytes + sum(file.size_bytes for file in source.execution_files)


def _copy_tensors(source: Source, offsets: tuple[int, ...], partition: PartitionWriter) -> None:
    rows = zip(source.tensors, offsets, strict=True)
    shards = {shard.path: shard for shard in source.shards}
    for name, group in groupby(rows, key=lambda row: row[0].shard):
        fd = open_regular(shards[name].real)
        try:
            for tensor, offset in group:
                partition.skip_to(offset)
                _copy(fd, tensor, partition)
        finally:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # it is not read again
            os.close(fd)


def _copy(fd: int, tensor: StoredTensor, partition: PartitionWriter) -> None:
    position, end = tensor.offset, tensor.offset + tensor.size_bytes
    while position < end:
        count = _read(fd, partition.room()[: end - position], position, tensor.shard)
        partition.advance(count)
        position += count


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
