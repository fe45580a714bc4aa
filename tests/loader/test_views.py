"""Tensors as views on memory."""

from __future__ import annotations

import gc

import pytest

from sllm.errors import UnknownDtype
from sllm.loader.dtypes import ITEM_BYTES
from sllm.loader.format import Tensor, contiguous
from sllm.loader.memory import space

torch = pytest.importorskip("torch")

from sllm.loader.views import bytes_of, tensors_on  # noqa: E402 - needs torch


def entry(offset: int, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...] | None = None) -> Tensor:
    return Tensor(0, offset, 0, dtype, shape, contiguous(shape) if stride is None else stride)


def test_tensors_are_views_of_the_memory_scalars_and_empty_ones_too() -> None:
    memory = space.anonymous(4096)
    memory.view(64, 8)[:] = b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    memory.view(128, 2)[:] = b"\x80\x3f"
    found = tensors_on(
        bytes_of(memory.buffer),
        {
            "matrix": entry(64, "float32", (1, 2)),
            "scalar": entry(128, "bfloat16", ()),
            "empty": entry(4096, "int64", (0, 3)),
        },
    )
    assert list(found) == ["matrix", "scalar", "empty"]
    assert found["matrix"].tolist() == [[1.0, 2.0]]
    assert found["scalar"].item() == 1.0
    assert found["empty"].shape == (0, 3)
    memory.view(64, 4)[:] = b"\x00\x00\x00\x40"
    assert found["matrix"].tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_of_the_format_can_be_addressed(dtype: str) -> None:
    memory = space.anonymous(4096)
    item = ITEM_BYTES[dtype]
    memory.view(1024, 3 * item)[:] = bytes(n % 2 for n in range(3 * item))  # 0 and 1 are what a bool may be
    found = tensors_on(bytes_of(memory.buffer), {"w": entry(1024, dtype, (3,))})["w"]
    assert str(found.dtype) == f"torch.{dtype}"
    assert bytes(found.view(torch.uint8).tolist()) == bytes(memory.view(1024, 3 * item))


def test_strides_are_kept() -> None:
    memory = space.anonymous(64)
    memory.view(0, 6)[:] = bytes(range(6))
    found = tensors_on(
        bytes_of(memory.buffer), {"t": entry(0, "uint8", (3, 2), (1, 3)), "e": entry(0, "uint8", (2, 2), (0, 1))}
    )
    assert found["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["e"].tolist() == [[0, 1], [0, 1]]


def test_partitions_begin_where_they_are_said_to() -> None:
    memory = space.anonymous(8192)
    memory.view(4096, 1)[:] = b"\x07"
    second = Tensor(1, 0, 1, "uint8", (1,), (1,))
    assert tensors_on(bytes_of(memory.buffer), {"w": second}, (0, 4096))["w"].item() == 7


def test_a_length_that_is_no_multiple_of_the_element_is_no_hindrance() -> None:
    memory = space.anonymous(4096 + 3)
    assert tensors_on(bytes_of(memory.buffer), {"w": entry(4088, "int64", (1,))})["w"].item() == 0


def test_memory_of_no_bytes_has_empty_tensors() -> None:
    memory = space.anonymous(0)
    assert tensors_on(bytes_of(memory.buffer), {"w": entry(0, "float32", (0,))})["w"].tolist() == []


def test_the_memory_lives_as_long_as_the_last_tensor() -> None:
    memory = space.anonymous(4096)
    address = memory.address
    row = tensors_on(bytes_of(memory.buffer), {"w": entry(0, "uint8", (2, 2))})["w"][1]
    del memory
    gc.collect()
    assert is_mapped(address)
    assert row.tolist() == [0, 0]
    del row
    gc.collect()
    assert not is_mapped(address)


@pytest.mark.parametrize("dtype", ["no_such_dtype", "nn", "Tensor"])
def test_a_dtype_that_torch_lacks_is_unknown(dtype: str) -> None:
    memory = space.anonymous(64)
    with pytest.raises(UnknownDtype, match=dtype):
        tensors_on(bytes_of(memory.buffer), {"w": entry(0, dtype, (1,))})


def is_mapped(address: int) -> bool:
    with open("/proc/self/maps", encoding="utf-8") as lines:
        ranges = [line.split(" ", 1)[0].split("-") for line in lines]
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)
