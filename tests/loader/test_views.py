"""Tensors on shared memory."""

from __future__ import annotations

import mmap

import pytest

from sllm.core.launch import TensorEntry
from sllm.errors import UnsupportedCheckpoint

torch = pytest.importorskip("torch")

from sllm.loader.views import views  # noqa: E402 - needs torch


def entry(name: str, offset: int, size_bytes: int, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name=name, offset=offset, size_bytes=size_bytes, dtype=dtype, shape=shape)


def test_tensors_are_views_of_the_memory_scalars_and_empty_ones_too() -> None:
    memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE)
    memory[64:72] = b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    memory[128:130] = b"\x80\x3f"
    entries = [
        entry("matrix", 64, 8, "float32", (1, 2)),
        entry("scalar", 128, 2, "bfloat16", ()),
        entry("empty", 192, 0, "int64", (0, 3)),
    ]
    found = dict(views(memory, entries))
    assert found["matrix"].tolist() == [[1.0, 2.0]]
    assert found["scalar"].item() == 1.0
    assert found["empty"].shape == (0, 3)
    memory[64:68] = b"\x00\x00\x00\x40"
    assert found["matrix"].tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("dtype", ["no_such_dtype", "nn", "Tensor"])
def test_a_dtype_that_torch_lacks_is_unsupported(dtype: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=dtype):
        next(views(mmap.mmap(-1, 64), [entry("w", 0, 4, dtype, (1,))]))
