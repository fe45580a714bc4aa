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
from sllm.loader.folder import read_manifest
from sllm.loader.format import Manifest
from sllm.loader.memory import arena, cuda, space
from sllm.loader.memory.arena import Allocation, Pool
from sllm.loader.pipeline import Control, Pipeline
from sllm.loader.plan import Plan, plan, ring_slots
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
    DeadlineExceeded, InvalidArgument (no such device), OperationFailed (the device). Nothing is left allocated then.
    """
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    target = _device(device)
    control = Control(verify=verify, progress=progress, cancelled=cancelled or (lambda: False), deadline=deadline)
    with collector.held_off():
        return _load(Path(path), target, pool, control)


def _load(folder: Path, target: torch.device, pool: Pool | None, control: Control) -> dict[str, torch.Tensor]:
    manifest = read_manifest(folder)
    loading = plan(manifest)
    with _opened(folder, loading) as files:
        if target.type == "cpu":
            return _load_here(manifest, loading, files, pool, control)
        return _load_onto(target, manifest, loading, files, pool, control)


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
def _opened(folder: Path, loading: Plan) -> Iterator[list[DirectFile]]:
    """Open all partitions before anything is allocated: what is missing or too short is known at once."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(DirectFile(folder / part.partition.file, part.partition.size_bytes))
            for part in loading.parts
        ]


def _load_here(
    manifest: Manifest, loading: Plan, files: list[DirectFile], pool: Pool | None, control: Control
) -> dict[str, torch.Tensor]:
    memory = arena.fresh(loading.size_bytes) if pool is None else pool.allocate(loading.size_bytes)
    try:
        pipeline = Pipeline(loading, files, _view(memory), control)
        return _addressed(pipeline, bytes_of(memory.buffer), manifest, loading)
    except BaseException:
        memory.release()
        raise


def _load_onto(
    device: torch.device,
    manifest: Manifest,
    loading: Plan,
    files: list[DirectFile],
    pool: Pool | None,
    control: Control,
) -> dict[str, torch.Tensor]:
    """Load through a ring of registered memory, which goes back when the last copy has ended."""
    slots = ring_slots(loading, pool.largest_bytes if pool else loading.size_bytes)
    target = cuda.arena(loading.size_bytes, device)
    ring = _ring(slots * loading.chunk_bytes, pool)
    try:
        pipeline = Pipeline(loading, files, _view(ring), control, copier=cuda.CudaCopier(target, device), slots=slots)
        return _addressed(pipeline, target, manifest, loading)
    except BaseException:
        target.untyped_storage().resize_(0)  # now, not when the error and its traceback are gone
        raise
    finally:
        ring.release()


def _addressed(pipeline: Pipeline, memory: torch.Tensor, manifest: Manifest, loading: Plan) -> dict[str, torch.Tensor]:
    """Run a load, and address the tensors while their bytes arrive."""
    try:
        pipeline.start()
        tensors = tensors_on(memory, manifest.tensors, loading.starts)
    except BaseException:
        pipeline.stop()
        with contextlib.suppress(Exception):
            pipeline.wait()
        raise
    pipeline.wait()
    return tensors


def _ring(size_bytes: int, pool: Pool | None) -> Allocation:
    if pool is not None:
        cuda.register(pool.memory)
        return pool.allocate(size_bytes)
    memory = space.anonymous(size_bytes)
    cuda.register(memory)
    return Allocation(buffer=memory.buffer, release=lambda: None)


def _view(memory: Allocation) -> memoryview:
    return memoryview(memory.buffer).cast("B")
