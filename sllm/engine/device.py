"""From the node's pool to a GPU. NOT YET RUN ON A GPU.

Each byte goes there once in the life of an engine host. Where CUDA can register the pool's memory read-only the device
fetches it from there, beside the registering of what follows; elsewhere through a little registered memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sllm.engine.weights import Weights
from sllm.loader.memory import cuda as cuda_memory
from sllm.loader.memory.base import DeviceCopier
from sllm.loader.memory.cuda import Registration
from sllm.loader.pipeline import COPIES_UNDER_WAY, copy_in_turn


@contextmanager
def registered(weights: Weights, *, cuda: Any = torch.cuda) -> Iterator[Registration | None]:
    """Make the pool's memory known to CUDA, which this process must have initialised, beside the block.

    None if the weights are not in the pool's own memory. Of a layout whose tensors are copied one by one (`hf`) all is
    one part, because a copy of a tensor must not cross from one part into the next.
    """
    memory = weights.memory if weights.is_shared else None
    if memory is None:
        yield None
        return
    part_bytes = cuda_memory.PART_BYTES if weights.manifest.layout == "runtime" else max(1, memory.size_bytes)
    registration = Registration(memory, part_bytes=part_bytes, cuda=cuda)
    try:
        yield registration
    finally:
        registration.close()


def on_device(
    weights: Weights, registration: Registration, device: torch.device, *, cuda: Any = torch.cuda
) -> torch.Tensor:
    """Copy the partition to a device, each chunk when it has arrived; return it as bytes there.

    Raises CapacityExceeded, OperationFailed, the error of the load.
    """
    most = max(1, min(COPIES_UNDER_WAY, weights.slots - 1))
    target = cuda_memory.arena(weights.size_bytes, device)
    copier: DeviceCopier = cuda_memory.CudaCopier(target, device, cuda=cuda)
    try:
        step = weights.manifest.chunk_bytes
        if not registration.wait(min(step, weights.size_bytes)):
            copier = cuda_memory.StagedCopier(copier, chunk_bytes=step, slots=most, cuda=cuda)
        copy_in_turn(_arriving(weights, registration), copier, most=most, ended=weights.taken)
    finally:
        copier.close()
    return target


def _arriving(weights: Weights, registration: Registration) -> Iterator[tuple[memoryview, int]]:
    """Yield each chunk when it has arrived and is registered, as far as it will be, and where it begins."""
    assert weights.memory is not None, "nothing has released it"
    step = weights.manifest.chunk_bytes
    for chunk in range(weights.chunks):
        start, place = chunk * step, chunk % weights.slots * step
        length = min(step, weights.size_bytes - start)
        weights.feed.wait(start + length)
        registration.wait(place + length)
        yield weights.memory.view(place, length), start
