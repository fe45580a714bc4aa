"""The header parser: one test for each way a file can be wrong, and nothing but our errors for any bytes at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm.errors import InvalidCheckpoint, UnknownDtype, UnsupportedCheckpoint
from sllm.loader.safetensors import MAX_HEADER_BYTES, StoredTensor, header_bytes, parse

SHARD = "model.safetensors"


def read(file: bytes) -> tuple[StoredTensor, ...]:
    length = header_bytes(file[:8], len(file), SHARD)
    return parse(file[8 : 8 + length], len(file), SHARD)


def entry(**changes: Any) -> bytes:
    """A header with one tensor of 8 bytes, with fields changed."""
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return json.dumps({"w": fields}).encode()


def test_finds_every_tensor_in_the_order_of_its_data(packed: Callable[..., bytes], small_tensors: Any) -> None:
    file = packed(small_tensors, format="pt")
    tensors = read(file)
    assert {t.name: file[t.offset : t.offset + t.size_bytes] for t in tensors} == {
        name: content for name, (_, _, content) in small_tensors.items()
    }
    assert [t.offset for t in tensors] == sorted(t.offset for t in tensors)
    assert {t.name: (t.dtype, t.shape) for t in tensors} == {
        "model.embed.weight": ("float32", (4, 2)),
        "model.scale": ("bfloat16", ()),
        "model.empty": ("int64", (0, 3)),
        "lm_head.weight": ("float16", (3,)),
    }


def test_refuses_a_file_shorter_than_its_length_field() -> None:
    with pytest.raises(InvalidCheckpoint, match="too short"):
        read(b"abc")


def test_refuses_a_header_length_that_no_header_has() -> None:
    with pytest.raises(InvalidCheckpoint, match="not safetensors"):
        header_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 1 << 40, SHARD)


def test_refuses_a_file_that_ends_within_its_header() -> None:
    with pytest.raises(InvalidCheckpoint, match="truncated"):
        header_bytes((100).to_bytes(8, "little"), 50, SHARD)


@pytest.mark.parametrize(
    "header", [b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"w": 1', b'{"w": ' + b"9" * 5000 + b"}"]
)
def test_refuses_a_header_that_is_not_a_json_object(header: bytes, packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint):
        read(packed_raw(header, b""))


def test_refuses_a_name_that_appears_twice(packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    one = '"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    with pytest.raises(InvalidCheckpoint, match="twice"):
        read(packed_raw(f"{{{one}, {one}}}".encode(), bytes(8)))


def test_refuses_a_name_that_utf8_cannot_write(packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint, match="UTF-8"):
        read(packed_raw(rb'{"\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)))


@pytest.mark.parametrize("metadata", [[], {"a": 1}, "text"])
def test_refuses_metadata_that_is_not_text_by_name(metadata: Any, packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint, match="__metadata__"):
        read(packed_raw(json.dumps({"__metadata__": metadata}).encode(), b""))


@pytest.mark.parametrize("value", [[], 3, {}, {"dtype": "F32", "shape": [2]}])
def test_refuses_a_tensor_that_is_not_described(value: Any, packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint, match="lacks"):
        read(packed_raw(json.dumps({"w": value}).encode(), b""))


@pytest.mark.parametrize("shape", ["2", [2.0], [True], [-1], [1 << 70], [1] * 65, None])
def test_refuses_a_shape_that_is_not_counts(shape: Any, packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint, match="shape"):
        read(packed_raw(entry(shape=shape), bytes(8)))


@pytest.mark.parametrize("offsets", [[0], [8, 0], [0, 8, 8], [-8, 0], ["0", "8"], 8])
def test_refuses_offsets_that_are_not_a_range(offsets: Any, packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint, match="offsets"):
        read(packed_raw(entry(data_offsets=offsets), bytes(8)))


def test_refuses_a_size_that_dtype_and_shape_do_not_make(packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint, match="cannot have 8 bytes"):
        read(packed_raw(entry(shape=[3]), bytes(8)))


def test_refuses_a_dtype_it_does_not_know_as_unsupported(packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(UnknownDtype, match="I128"):
        read(packed_raw(entry(dtype="I128"), bytes(8)))


@pytest.mark.parametrize(
    ("tag", "shape", "size", "dtype", "read_as"),
    [
        ("F4", [3, 4], 6, "float4_e2m1fn_x2", (3, 2)),
        ("F6_E2M3", [2, 8], 12, "uint8", (2, 6)),
        ("F6_E3M2", [4], 3, "uint8", (3,)),
        ("F8_E8M0", [8], 8, "float8_e8m0fnu", (8,)),
    ],
)
def test_elements_of_less_than_a_byte_are_taken_in_the_bytes_that_hold_them(
    packed_raw: Callable[[bytes, bytes], bytes], tag: str, shape: list[int], size: int, dtype: str, read_as: Any
) -> None:
    (tensor,) = read(packed_raw(entry(dtype=tag, shape=shape, data_offsets=[0, size]), bytes(size)))
    assert (tensor.dtype, tensor.shape, tensor.size_bytes) == (dtype, read_as, size)


@pytest.mark.parametrize("shape", [[], [3], [4, 1]])
def test_refuses_elements_that_do_not_fill_their_bytes(
    packed_raw: Callable[[bytes, bytes], bytes], shape: list[int]
) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="does not fill whole bytes"):
        read(packed_raw(entry(dtype="F4", shape=shape), bytes(8)))
    with pytest.raises(InvalidCheckpoint, match="not text"):
        read(packed_raw(entry(dtype=4), bytes(8)))


def test_refuses_a_truncated_file(packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint, match="truncated"):
        read(packed_raw(entry(), bytes(7)))


def test_refuses_bytes_after_the_last_tensor(packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint, match="1 bytes after its last tensor"):
        read(packed_raw(entry(), bytes(9)))


def test_refuses_a_hole_between_tensors(packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    with pytest.raises(InvalidCheckpoint, match="4 bytes before 'w'"):
        read(packed_raw(entry(data_offsets=[4, 12]), bytes(12)))


def test_refuses_tensors_that_overlap(packed_raw: Callable[[bytes, bytes], bytes]) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    with pytest.raises(InvalidCheckpoint, match="overlaps"):
        read(packed_raw(json.dumps(header).encode(), bytes(12)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
described = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F4", ""]) | json_values,
        "shape": st.lists(st.integers(0, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2) | json_values,
    }
)


@given(
    header=st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), described | json_values, max_size=4),
    data=st.integers(0, 64),
)
def test_any_json_gives_tensors_that_cover_the_data_or_our_error(header: dict[str, Any], data: int) -> None:
    text = json.dumps(header).encode()
    file = len(text).to_bytes(8, "little") + text + bytes(data)
    try:
        tensors = read(file)
    except (InvalidCheckpoint, UnsupportedCheckpoint):
        return
    assert sum(t.size_bytes for t in tensors) == data


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_file_gives_our_error_or_tensors_within_it(
    flips: list[tuple[int, int]], packed: Callable[..., bytes], small_tensors: Any
) -> None:
    file = bytearray(packed(small_tensors))
    for position, value in flips:
        file[position % len(file)] = value
    try:
        tensors = read(bytes(file))
    except (InvalidCheckpoint, UnsupportedCheckpoint):
        return
    assert all(8 < t.offset <= t.offset + t.size_bytes <= len(file) for t in tensors)
