"""Manifest: what the store knows of a checkpoint, and how its content is named. Pure.

`checkpoint.json` beside the files is its JSON. The digest names the content alone (files by path, size and sha256), so
that two nodes that added the same files, from wherever and under whatever name, agree.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sllm.core.checkpoint import Checkpoint
from sllm.core.launch import TensorEntry
from sllm.errors import InvalidCheckpoint
from sllm.loader.safetensors import StoredTensor

FORMAT = 1
ALIGNMENT = 64  # bytes; a cache line, and enough for any vector load


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of the checkpoint's folder; `sha256` is in hexadecimal."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`shards` hold tensors, `execution_files` all else; both are in the order of their paths."""

    checkpoint: Checkpoint
    shards: tuple[StoredFile, ...]
    execution_files: tuple[StoredFile, ...]
    tensors: tuple[StoredTensor, ...]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises InvalidCheckpoint for what this version did not write."""
        try:
            return cls._parsed(json.loads(text))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidCheckpoint(f"a checkpoint's manifest cannot be read: {error}") from error

    @classmethod
    def _parsed(cls, values: dict[str, Any]) -> Manifest:
        if values["format"] != FORMAT:
            raise InvalidCheckpoint(f"a checkpoint's manifest has format {values['format']!r}, not {FORMAT}")
        return cls(
            checkpoint=Checkpoint(**values["checkpoint"]),
            shards=tuple(StoredFile(**file) for file in values["shards"]),
            execution_files=tuple(StoredFile(**file) for file in values["execution_files"]),
            tensors=tuple(StoredTensor(**{**t, "shape": tuple(t["shape"])}) for t in values["tensors"]),
        )


def digest_of(files: Sequence[StoredFile]) -> str:
    """Return the name of a content, e.g. `sha256:1f0c…`."""
    rows = sorted((file.path, file.size_bytes, file.sha256) for file in files)
    canonical = json.dumps({"format": FORMAT, "files": rows}, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def main_dtype(tensors: Sequence[StoredTensor]) -> str:
    """Return the dtype that most bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size_bytes
    return max(sorted(sizes), key=lambda dtype: sizes[dtype])


def layout(tensors: Sequence[StoredTensor]) -> tuple[tuple[TensorEntry, ...], int]:
    """Place tensors in one memory region, each aligned; return the entries and the region's size in bytes."""
    entries: list[TensorEntry] = []
    position = 0
    for tensor in tensors:
        entries.append(
            TensorEntry(
                name=tensor.name,
                offset=position,
                size_bytes=tensor.size_bytes,
                dtype=tensor.dtype,
                shape=tensor.shape,
            )
        )
        position += -(-tensor.size_bytes // ALIGNMENT) * ALIGNMENT
    return tuple(entries), position
