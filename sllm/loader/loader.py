"""Loads a checkpoint as a library: no daemon. Everything is in place and verified when `load` returns."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sllm.errors import InvalidArgument
from sllm.loader import collector
from sllm.loader.arrangement import Arrangement, arrange, ring_slots
from sllm.loader.folder import checked_path, read_manifest
from sllm.loader.format import Manifest
from sllm.loader.memory import cuda
from sllm.loader.memory.pool import Allocation, Pool, fresh, new_memory
from sllm.loader.pipeline import Control, Pipeline
from sllm.loader.storage.direct import DirectFile
from sllm.loader.views import bytes_of, tensors_on


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    verify: bool = True,
    pool: Pool | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    deadline_s: float | None = None,
) -> dict[str, torch.Tensor]:
    """Return all tensors of the checkpoint folder `path`, by name, in load order, on `device` ("cpu", "cuda").

    All tensors are views on one piece of memory, without copies: on the CPU the memory that was read into, a piece of
    `pool` or fresh; on a GPU one block of its memory, for which `pool` (or a little fresh memory) is only passed
    through. Any one of them keeps the whole piece; tied tensors share their bytes. They may be written to.

    `verify` compares each chunk with its xxh3-64 as it is read. `progress(done, total)` gets bytes and is called from
    other threads, one call at a time; `cancelled()` is asked at every chunk; `deadline_s` counts seconds from now.
    While tensors of 10,000-tensor checkpoints are addressed, their bytes arrive.

    Raises the InvalidCheckpoint that says what is wrong (ManifestMissing, PartitionTruncated, ChunkCorrupt, ...),
    UnsupportedCheckpoint, CapacityExceeded (the pool, the machine or the device has no room), Cancelled,
    DeadlineExceeded, InvalidArgument (no such device, no path), OperationFailed (the device). Nothing is left
    allocated then.
    """
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    folder, target = checked_path(path), _device(device)
    control = Control(verify=verify, progress=progress, cancelled=cancelled or (lambda: False), deadline=deadline)
    with collector.held_off():
        return _load(folder, target, pool, control)


def _load(folder: Path, target: torch.device, pool: Pool | None, control: Control) -> dict[str, torch.Tensor]:
    manifest = read_manifest(folder)
    arrangement = arrange(manifest)
    with _opened(folder, arrangement) as files:
        if target.type == "cpu":
            return _load_here(manifest, arrangement, files, pool, control)
        return _load_onto(target, manifest, arrangement, files, pool, control)


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument(f"{str(name)!r} is no device") from error
    if device.type == "cuda":
        cuda.check_device(device)
    elif device.type != "cpu":
        raise InvalidArgument(f"checkpoints are loaded onto cpu or cuda, not {str(name)!r}")
    return device


@contextlib.contextmanager
def _opened(folder: Path, arrangement: Arrangement) -> Iterator[list[DirectFile]]:
    """Open all partitions before anything is allocated: what is missing or too short is known at once."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(DirectFile(folder / part.partition.file, part.partition.size_bytes))
            for part in arrangement.parts
        ]


def _load_here(
    manifest: Manifest, arrangement: Arrangement, files: list[DirectFile], pool: Pool | None, control: Control
) -> dict[str, torch.Tensor]:
    memory = fresh(arrangement.size_bytes) if pool is None else pool.allocate(arrangement.size_bytes)
    try:
        pipeline = Pipeline(arrangement, files, _view(memory), control)
        return _addressed(pipeline, bytes_of(memory.buffer), manifest, arrangement)
    except BaseException:
        memory.release()
        raise


def _load_onto(
    device: torch.device,
    manifest: Manifest,
    arrangement: Arrangement,
    files: list[DirectFile],
    pool: Pool | None,
    control: Control,
) -> dict[str, torch.Tensor]:
    """Load through a ring of registered memory, which goes back when the last copy has ended."""
    slots = ring_slots(arrangement, pool.largest_bytes if pool else arrangement.size_bytes)
    target = cuda.arena(arrangement.size_bytes, device)
    try:
        with _ring(slots * arrangement.chunk_bytes, pool) as ring:
            copier = cuda.CudaCopier(target, device)
            pipeline = Pipeline(arrangement, files, _view(ring), control, copier=copier, slots=slots)
            return _addressed(pipeline, target, manifest, arrangement)
    except BaseException:
        target.untyped_storage().resize_(0)  # now, not when the error and its traceback are gone
        raise


def _addressed(
    pipeline: Pipeline, memory: torch.Tensor, manifest: Manifest, arrangement: Arrangement
) -> dict[str, torch.Tensor]:
    """Run a load, and address the tensors while their bytes arrive."""
    try:
        pipeline.start()
        tensors = tensors_on(memory, manifest.tensors, arrangement.starts)
    except BaseException:
        pipeline.stop()
        with contextlib.suppress(Exception):  # whatever ended the load: the first error is the one to raise
            pipeline.wait()
        raise
    pipeline.wait()
    return tensors


@contextlib.contextmanager
def _ring(size_bytes: int, pool: Pool | None) -> Iterator[Allocation]:
    """Memory that CUDA knows. Raises CapacityExceeded, Conflict if the pool is closed."""
    memory = new_memory(size_bytes) if pool is None else pool.memory
    cuda.register(memory)
    ring = Allocation(buffer=memory.buffer, release=lambda: None) if pool is None else pool.allocate(size_bytes)
    try:
        yield ring
    finally:
        ring.release()


def _view(memory: Allocation) -> memoryview:
    return memoryview(memory.buffer).cast("B")
