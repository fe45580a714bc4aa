"""Tensors as views on shared memory: no copy. The only torch importer of this package; engine hosts alone use it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

import torch

from sllm.core.launch import TensorEntry
from sllm.errors import UnsupportedCheckpoint


def views(memory: mmap.mmap, tensors: Sequence[TensorEntry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for each entry, in the order given.

    `memory` must be writable (MAP_PRIVATE with PROT_WRITE: a write then stays in this process, and torch does not
    warn). Each tensor keeps the mapping alive. Raises UnsupportedCheckpoint for a dtype that this torch does not have.
    """
    for entry in tensors:
        yield entry.name, _view(memory, entry)


def _view(memory: mmap.mmap, entry: TensorEntry) -> torch.Tensor:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedCheckpoint(f"tensor {entry.name!r} has dtype {entry.dtype!r}, which this torch does not have")
    if entry.size_bytes == 0:
        return torch.empty(entry.shape, dtype=dtype)  # frombuffer refuses zero elements
    count = entry.size_bytes // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.offset).reshape(entry.shape)
