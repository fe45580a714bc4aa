"""The safetensors header: bytes -> checked tensor entries. Pure; every byte of the input is distrusted.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' data. Offsets in the JSON count
from the end of the header; tensors must cover the data exactly: no hole, no overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sllm.errors import InvalidCheckpoint, UnknownDtype, UnsupportedCheckpoint
from sllm.loader.dtypes import ITEM_BYTES
from sllm.loader.format import is_utf8
from sllm.loader.untrusted import json_object

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # as the format's own reader
_MAX_DIMENSIONS = 64  # torch's limit

# tag -> torch dtype by name
_DTYPES: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
# Sub-byte tags -> (the dtype of their containers, so many elements, in so many containers of a byte); torch has none of
# 6 bits.
_PACKED: dict[str, tuple[str, int, int]] = {
    "F4": ("float4_e2m1fn_x2", 2, 1),
    "F6_E2M3": ("uint8", 4, 3),
    "F6_E3M2": ("uint8", 4, 3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies on SSD: `size_bytes` bytes from `offset` of the file `shard`. `dtype` is torch's name."""

    name: str
    shard: str
    offset: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


def header_bytes(prefix: bytes, file_bytes: int, shard: str) -> int:
    """Return the header's length, from the first 8 bytes of a file of `file_bytes`. Raises InvalidCheckpoint."""
    if len(prefix) < LENGTH_BYTES or file_bytes < LENGTH_BYTES:
        raise InvalidCheckpoint(f"{shard} is too short to be safetensors: {file_bytes} bytes")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidCheckpoint(
            f"{shard} is not safetensors: its header would have {length} bytes",
            hint=f"at most {MAX_HEADER_BYTES} bytes are accepted",
        )
    if LENGTH_BYTES + length > file_bytes:
        raise InvalidCheckpoint(
            f"{shard} is truncated: its header needs {length} bytes, the file has {file_bytes}", hint="copy it again"
        )
    return length


def parse(header: bytes, file_bytes: int, shard: str) -> tuple[StoredTensor, ...]:
    """Return the tensors of a file in the order of their data. Raises InvalidCheckpoint, UnsupportedCheckpoint."""
    base = LENGTH_BYTES + len(header)
    entries = json_object(header, f"{shard}: its header")
    _check_metadata(entries.pop("__metadata__", {}), shard)
    tensors = sorted(
        (_tensor(name, entry, base, shard) for name, entry in entries.items()),
        key=lambda tensor: (tensor.offset, tensor.size_bytes),
    )
    _check_cover(tensors, base, file_bytes, shard)
    return tuple(tensors)


def _check_metadata(metadata: Any, shard: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidCheckpoint(f"{shard}: __metadata__ in its header must map names to text")


def _tensor(name: str, entry: Any, base: int, shard: str) -> StoredTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InvalidCheckpoint(f"{shard}: tensor {name!r} lacks dtype, shape or data_offsets")
    if not is_utf8(name):
        raise InvalidCheckpoint(f"{shard}: tensor {name[:80]!r} has a name that UTF-8 cannot write")
    dtype, shape = _dtype(name, entry["dtype"], _counts(name, "shape", entry["shape"], shard), shard)
    offsets = _counts(name, "data_offsets", entry["data_offsets"], shard)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidCheckpoint(f"{shard}: tensor {name!r} has offsets {list(offsets)}, not [begin, end]")
    size_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * ITEM_BYTES[dtype] != size_bytes:
        raise InvalidCheckpoint(
            f"{shard}: tensor {name!r} ({entry['dtype']}, shape {entry['shape']}) cannot have {size_bytes} bytes"
        )
    return StoredTensor(
        name=name, shard=shard, offset=base + offsets[0], size_bytes=size_bytes, dtype=dtype, shape=shape
    )


def _dtype(name: str, tag: Any, shape: tuple[int, ...], shard: str) -> tuple[str, tuple[int, ...]]:
    """Return torch's dtype, and the shape in elements of that."""
    if not isinstance(tag, str):
        raise InvalidCheckpoint(f"{shard}: tensor {name!r} has a dtype that is not text")
    if tag in _PACKED:
        dtype, elements, containers = _PACKED[tag]
        if not shape or shape[-1] % elements:
            raise UnsupportedCheckpoint(
                f"{shard}: tensor {name!r} of dtype {tag} and shape {list(shape)} does not fill whole bytes"
            )
        return dtype, (*shape[:-1], shape[-1] // elements * containers)
    if tag not in _DTYPES:
        raise UnknownDtype(f"{shard}: tensor {name!r} has dtype {tag[:32]!r}, which is not supported")
    return _DTYPES[tag], shape


def _counts(name: str, what: str, values: Any, shard: str) -> tuple[int, ...]:
    # `type(...) is int`, because True is an int too.
    valid = isinstance(values, list) and len(values) <= _MAX_DIMENSIONS
    if not valid or not all(type(value) is int and 0 <= value < 1 << 63 for value in values):
        raise InvalidCheckpoint(f"{shard}: tensor {name!r} has a {what} that is not a short list of counts")
    return tuple(values)


def _check_cover(tensors: list[StoredTensor], base: int, file_bytes: int, shard: str) -> None:
    position = base
    for tensor in tensors:
        if tensor.offset < position:
            raise InvalidCheckpoint(f"{shard}: tensor {tensor.name!r} overlaps the one before it")
        if tensor.offset > position:
            raise InvalidCheckpoint(f"{shard}: {tensor.offset - position} bytes before {tensor.name!r} are no tensor's")
        position += tensor.size_bytes
    if position > file_bytes:
        raise InvalidCheckpoint(
            f"{shard} is truncated: its tensors need {position} bytes, the file has {file_bytes}", hint="copy it again"
        )
    if position < file_bytes:
        raise InvalidCheckpoint(f"{shard}: {file_bytes - position} bytes after its last tensor are no tensor's")
