"""The checkpoint format: manifest bytes <-> checked values. Pure; every byte of the input is distrusted.

The format is specified in docs/checkpoint-format.md. A checkpoint is a folder with `manifest.json`, one
`partition-NNN.bin` per device rank, and the model's execution files.
The manifest's first line is a header; its digest is the sha256 of all bytes after that line, so that it names the
content and finds every flipped bit of the index in one pass.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import add, mod
from typing import Any, NamedTuple

from sllm.core.runtime_layout import CHECKPOINT, ENGINE, ENGINE_VERSION
from sllm.errors import (
    FormatTooNew,
    ManifestCorrupt,
    ManifestMalformed,
    TensorMisdescribed,
    TensorMisplaced,
    UnknownDtype,
    UnsupportedCheckpoint,
)
from sllm.loader.dtypes import ITEM_BYTES
from sllm.loader.untrusted import json_object

MANIFEST = "manifest.json"
FORMAT = "sllm-checkpoint"
VERSION = 1
PAGE_BYTES = 4096  # what O_DIRECT and DMA want: partitions are padded to it, large tensors begin at a multiple
PACKED_BYTES = 64  # smaller tensors begin at a multiple of this: a cache line, and enough for any vector load
LARGE_BYTES = 64 << 10  # from this size on a tensor begins at a page
MAX_MANIFEST_BYTES = 256 << 20
MAX_CHUNK_BYTES = 8 << 20
MAX_ARCHITECTURE_CHARACTERS = 256
_MAX_DIMENSIONS = 64  # torch's limit
_MAX_ELEMENTS = 1 << 63  # torch counts in 64 bits with a sign; a stride of 0 makes many of few bytes
_LIMIT = 1 << 62
_HASH = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTITION = re.compile(r"partition-[0-9]{3}\.bin")
_BODY_KEYS = {"layout", "key", "model", "chunk_bytes", "partitions", "execution_files", "kinds", "tensors"}
_HEADER_KEYS = {"format", "version", "digest", "created_at", "source"}
_COLUMNS = ("names", "partitions", "offsets", "kinds")
LAYOUTS = ("hf", "runtime")


class Tensor(NamedTuple):
    """Where a tensor lies: `size_bytes` bytes from `offset` of a partition, seen through dtype, shape and stride.

    `stride` counts elements, as torch's. `size_bytes` is what the elements span: a view of a larger storage spans its
    holes too; 0 if there are no elements. Two tensors may share bytes (tied weights, views).
    """

    partition: int
    offset: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


# Without the checks of its constructor: 10,000 are made at once, of rows that have the right length.
_new_tensor: Callable[[tuple[object, ...]], Tensor] = partial(tuple.__new__, Tensor)


class _Kind(NamedTuple):
    """What tensors have in common: all but the name and the place."""

    size_bytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One device rank's bytes. `size_bytes` is a multiple of PAGE_BYTES; `chunks` has the xxh3-64 of each
    `Manifest.chunk_bytes` bytes (the last may be shorter), in hexadecimal."""

    file: str
    size_bytes: int
    sha256: str
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """An execution file: its name in the folder, its length, its sha256 in hexadecimal."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the model's own configuration says. `max_model_len` counts tokens."""

    architecture: str
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds. `digest` names the content (`sha256:...`); `source` and `created_at` are no part of it.

    `layout` is "hf" (tensors named as in the source: for any engine, any parallelism) or "runtime" (an engine's own
    parameters, one partition per rank), which is good only where `key` holds. `tensors` are in load order.
    """

    partitions: tuple[Partition, ...]
    tensors: Mapping[str, Tensor]
    chunk_bytes: int
    layout: str = "hf"
    key: Mapping[str, str] = field(default_factory=dict)
    model: ModelFacts | None = None
    execution_files: tuple[StoredFile, ...] = ()
    source: str = ""
    created_at: float = 0.0
    digest: str = ""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all partitions, padding included: what a load moves."""
        return sum(partition.size_bytes for partition in self.partitions)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return self.tensor_bytes + sum(file.size_bytes for file in self.execution_files)

    @property
    def main_dtype(self) -> str:
        """The dtype that most bytes have."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.size_bytes
        return max(sorted(sizes), key=lambda dtype: sizes[dtype]) if sizes else ""


def chunk_bytes_for(size_bytes: int) -> int:
    """Return the chunk size for a partition: small ones get small chunks, so that all threads have work."""
    if size_bytes < 64 << 20:
        return 1 << 20
    return 2 << 20 if size_bytes < 512 << 20 else MAX_CHUNK_BYTES


def alignment_of(size_bytes: int) -> int:
    """Return what the offset of a tensor of this size is a multiple of."""
    return PAGE_BYTES if size_bytes >= LARGE_BYTES else PACKED_BYTES


def place(sizes: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Return where tensors of these sizes (bytes, in load order) begin in a partition, and the partition's length."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(round_up(end, alignment_of(size)))
        end = offsets[-1] + size
    return tuple(offsets), round_up(end, PAGE_BYTES)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def span_bytes(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the bytes from the first element to the end of the last. Raises UnknownDtype."""
    item = ITEM_BYTES.get(dtype)
    if item is None:
        raise UnknownDtype(f"dtype {dtype[:40]!r} is not known")
    if 0 in shape:
        return 0
    return item * (1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(1, n)
    return tuple(reversed(strides))


def is_file_name(name: str) -> bool:
    """True if an execution file may have this name: a plain one, not hidden, which leads nowhere and is not ours."""
    plain = name != "" and name.isprintable() and "/" not in name and not name.startswith(".")
    return plain and name != MANIFEST and not _PARTITION.fullmatch(name)


def is_architecture(name: str) -> bool:
    """True if a model may have this architecture: reports, listings and tables of a whole cluster repeat it."""
    return 0 < len(name) <= MAX_ARCHITECTURE_CHARACTERS and name.isprintable()


def is_utf8(text: str) -> bool:
    """False for a text with a lone surrogate: JSON can say it (`"\\ud800"`), no message on a wire can carry it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- writing --------------------------------------------------------------------------------


def to_bytes(manifest: Manifest) -> bytes:
    """Return the manifest as it is stored; equal content gives equal bytes after the first line.

    Raises UnsupportedCheckpoint if it would be longer than any reader takes.
    """
    body = _body(manifest)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "digest": _digest(body),
        "created_at": manifest.created_at,
        "source": manifest.source,
    }
    data = _dumps(header)[:-1] + b",\n" + body
    if len(data) > MAX_MANIFEST_BYTES:
        raise UnsupportedCheckpoint(
            f"the manifest would have {len(data)} bytes, more than {MAX_MANIFEST_BYTES}",
            hint="save fewer tensors in one checkpoint, or under shorter names",
        )
    return data


def _body(manifest: Manifest) -> bytes:
    model = manifest.model
    body = {
        "layout": manifest.layout,
        "key": dict(sorted(manifest.key.items())),
        "model": model and {"architecture": model.architecture, "max_model_len": model.max_model_len},
        "chunk_bytes": manifest.chunk_bytes,
        "partitions": [
            {"file": p.file, "size_bytes": p.size_bytes, "sha256": p.sha256, "chunks": p.chunks}
            for p in manifest.partitions
        ],
        "execution_files": [
            {"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in manifest.execution_files
        ],
        **_index(manifest.tensors),
    }
    return _dumps(body)[1:] + b"\n"


def _index(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the index by columns, and apart from it each kind (size, dtype, shape, stride) once: 10,000 experts share
    a few, and lists of numbers are read several times faster than a row per tensor."""
    kinds: dict[_Kind, int] = {}
    numbers = [kinds.setdefault(_Kind(t.size_bytes, t.dtype, t.shape, t.stride), len(kinds)) for t in tensors.values()]
    return {
        "kinds": list(kinds),
        "tensors": {
            "names": list(tensors),
            "partitions": [tensor.partition for tensor in tensors.values()],
            "offsets": [tensor.offset for tensor in tensors.values()],
            "kinds": numbers,
        },
    }


def _digest(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# --- reading --------------------------------------------------------------------------------


def parse(data: bytes) -> Manifest:
    """Return the checked manifest. Raises the InvalidCheckpoint or UnsupportedCheckpoint that says what is wrong."""
    first, found, body = data.partition(b"\n")
    if not found or not first.endswith(b","):
        raise ManifestMalformed("the manifest's first line is not a header")
    header = json_object(first[:-1] + b"}", "the manifest's header", wrong=ManifestMalformed)
    _check_header(header)
    if header["digest"] != _digest(body):
        raise ManifestCorrupt("the manifest is not what was written: its digest does not match")
    values = json_object(b"{" + body, "the manifest", wrong=ManifestMalformed)
    if values.keys() != _BODY_KEYS:
        odd = sorted(values.keys() ^ _BODY_KEYS)[0]
        raise ManifestMalformed(f"the manifest lacks, or must not have, {odd[:40]!r}")
    return _manifest(header, values)


def _check_header(header: dict[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise ManifestMalformed(f"the manifest does not say that it is of format {FORMAT!r}")
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise ManifestMalformed("the manifest has no version")
    if version > VERSION:
        raise FormatTooNew(f"the checkpoint has format version {version}; this sllm reads up to {VERSION}")
    if header.keys() != _HEADER_KEYS:
        raise ManifestMalformed(f"the manifest's header does not have exactly {', '.join(sorted(_HEADER_KEYS))}")
    if not isinstance(header["digest"], str) or not isinstance(header["source"], str):
        raise ManifestMalformed("the manifest's header has a digest or a source that is not text")
    if not is_utf8(header["source"]):
        raise ManifestMalformed("the manifest's header has a source that UTF-8 cannot write")
    if type(header["created_at"]) not in (int, float) or not 0 <= header["created_at"] < _LIMIT:
        raise ManifestMalformed("the manifest's header has a created_at that is not a time")


def _manifest(header: dict[str, Any], values: dict[str, Any]) -> Manifest:
    chunk_bytes = _count(values["chunk_bytes"], "chunk_bytes")
    if chunk_bytes % PAGE_BYTES or not 0 < chunk_bytes <= MAX_CHUNK_BYTES or MAX_CHUNK_BYTES % chunk_bytes:
        raise ManifestMalformed(f"chunk_bytes is {chunk_bytes}, which is no part of {MAX_CHUNK_BYTES} in whole pages")
    if values["layout"] not in LAYOUTS:
        raise ManifestMalformed(f"the layout is {str(values['layout'])[:40]!r}, not one of {', '.join(LAYOUTS)}")
    partitions = tuple(_partition(each, chunk_bytes) for each in _list(values["partitions"], "partitions"))
    if [p.file for p in partitions] != [f"partition-{n:03d}.bin" for n in range(len(partitions))] or not partitions:
        raise ManifestMalformed("the partitions are not partition-000.bin and so on")
    kinds = tuple(_kind(row) for row in _list(values["kinds"], "kinds"))
    return Manifest(
        partitions=partitions,
        tensors=_tensors(values["tensors"], kinds, tuple(p.size_bytes for p in partitions)),
        chunk_bytes=chunk_bytes,
        layout=values["layout"],
        key=_key(values["key"], values["layout"]),
        model=_model(values["model"]),
        execution_files=_files(values["execution_files"]),
        source=header["source"],
        created_at=float(header["created_at"]),
        digest=header["digest"],
    )


def _partition(value: Any, chunk_bytes: int) -> Partition:
    if not isinstance(value, dict) or value.keys() != {"file", "size_bytes", "sha256", "chunks"}:
        raise ManifestMalformed("a partition must have file, size_bytes, sha256 and chunks")
    file, size = value["file"], _count(value["size_bytes"], "a partition's size_bytes")
    if not isinstance(file, str) or not _PARTITION.fullmatch(file):
        raise ManifestMalformed(f"a partition has the name {str(file)[:40]!r}")
    if size % PAGE_BYTES:
        raise ManifestMalformed(f"{file} has {size} bytes, which is no multiple of {PAGE_BYTES}")
    chunks = _list(value["chunks"], "a partition's chunks")
    if len(chunks) != -(-size // chunk_bytes):
        raise ManifestMalformed(f"{file} of {size} bytes cannot have {len(chunks)} chunks of {chunk_bytes}")
    if not all(isinstance(each, str) and _HASH.fullmatch(each) for each in chunks):
        raise ManifestMalformed(f"{file}: a chunk's hash is not 16 hexadecimal digits")
    return Partition(file=file, size_bytes=size, sha256=_sha256(value["sha256"], file), chunks=tuple(chunks))


def _kind(row: Any) -> _Kind:
    if type(row) is not list or len(row) != 4:
        raise ManifestMalformed("a kind of tensor is not [size_bytes, dtype, shape, stride]")
    size, dtype, shape, stride = row
    size = _count(size, "a kind's size_bytes")
    if not isinstance(dtype, str):
        raise ManifestMalformed("a kind of tensor has a dtype that is not text")
    if not (_are_counts(shape) and _are_counts(stride) and len(shape) == len(stride) <= _MAX_DIMENSIONS):
        raise ManifestMalformed("a kind of tensor has a shape and stride that are not short lists of counts")
    if math.prod(map(partial(max, 1), shape)) >= _MAX_ELEMENTS:  # torch multiplies beside a 0 too
        raise TensorMisdescribed("a kind of tensor has more elements than 64 bits can count")
    kind = _Kind(size, dtype, tuple(shape), tuple(stride))
    span = span_bytes(dtype, kind.shape, kind.stride)
    if span != size:
        raise TensorMisdescribed(f"a {dtype} of shape {shape} and stride {stride} spans {span} bytes, not {size}")
    return kind


def _tensors(columns: Any, kinds: tuple[_Kind, ...], limits: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the index. Whole columns are checked at once, so that 10,000 tensors take a few milliseconds."""
    if not isinstance(columns, dict) or columns.keys() != set(_COLUMNS):
        raise ManifestMalformed(f"tensors must have {', '.join(_COLUMNS)}")
    names, partitions, offsets, numbers = (columns[each] for each in _COLUMNS)
    if not (_are_counts(partitions) and _are_counts(offsets) and _are_counts(numbers)):
        raise ManifestMalformed("the columns of tensors are not lists of counts")
    if type(names) is not list or not {*map(type, names)} <= {str} or len({*names}) != len(names):
        raise ManifestMalformed("the names of tensors are not a list of different texts")
    if not is_utf8("\0".join(names)):
        raise ManifestMalformed("the name of a tensor is one that UTF-8 cannot write")
    if not len(names) == len(partitions) == len(offsets) == len(numbers):
        raise ManifestMalformed("the columns of tensors differ in length")
    if max(numbers, default=-1) >= len(kinds):
        raise ManifestMalformed("a tensor is of a kind that the manifest does not list")
    if not _are_well_placed(partitions, offsets, numbers, kinds, limits):
        _check_each_place(names, partitions, offsets, [kinds[number] for number in numbers], limits)
    rows = map(add, zip(partitions, offsets, strict=True), map(kinds.__getitem__, numbers))
    return dict(zip(names, map(_new_tensor, rows), strict=True))


def _are_well_placed(
    partitions: list[int], offsets: list[int], numbers: list[int], kinds: tuple[_Kind, ...], limits: tuple[int, ...]
) -> bool:
    """Return True if all tensors are aligned and end before the shortest partition does: a few loops of the
    interpreter's own, where a look at each tensor takes three times as long."""
    sizes = [kind.size_bytes for kind in kinds]
    items = [ITEM_BYTES[kind.dtype] for kind in kinds]
    inside = max(map(add, offsets, map(sizes.__getitem__, numbers)), default=0) <= min(limits)
    unaligned = any(map(mod, offsets, map(items.__getitem__, numbers)))
    return inside and not unaligned and max(partitions, default=0) < len(limits)


def _check_each_place(
    names: list[str], partitions: list[int], offsets: list[int], kinds: list[_Kind], limits: tuple[int, ...]
) -> None:
    for name, partition, offset, (size, dtype, _, _) in zip(names, partitions, offsets, kinds, strict=True):
        if partition >= len(limits) or offset + size > limits[partition]:
            raise TensorMisplaced(f"tensor {name[:80]!r} lies outside its partition")
        if offset % ITEM_BYTES[dtype]:
            raise TensorMisplaced(f"tensor {name[:80]!r} at offset {offset} is not aligned to its elements")


def _are_counts(values: Any) -> bool:
    """True for a list of integers from 0 to below 2**62; True is an int to Python, not to us."""
    if type(values) is not list or not {*map(type, values)} <= {int}:
        return False
    return not values or (min(values) >= 0 and max(values) < _LIMIT)


def _model(value: Any) -> ModelFacts | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"architecture", "max_model_len"}:
        raise ManifestMalformed("model must have architecture and max_model_len")
    if not isinstance(value["architecture"], str) or not is_architecture(value["architecture"]):
        raise ManifestMalformed("the model's architecture is not a short printable text")
    length = _count(value["max_model_len"], "max_model_len")
    return ModelFacts(architecture=value["architecture"], max_model_len=length)


def _files(rows: Any) -> tuple[StoredFile, ...]:
    files = tuple(_file(row) for row in _list(rows, "execution_files"))
    paths = [file.path for file in files]
    if paths != sorted(set(paths)):
        raise ManifestMalformed("the execution files are not sorted by name, or one is named twice")
    return files


def _file(row: Any) -> StoredFile:
    if not isinstance(row, dict) or row.keys() != {"path", "size_bytes", "sha256"}:
        raise ManifestMalformed("an execution file must have path, size_bytes and sha256")
    path = row["path"]
    if not isinstance(path, str) or not is_file_name(path):
        raise ManifestMalformed(f"an execution file has the name {str(path)[:80]!r}")
    return StoredFile(
        path=path, size_bytes=_count(row["size_bytes"], f"size_bytes of {path}"), sha256=_sha256(row["sha256"], path)
    )


def _key(value: Any, layout: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ManifestMalformed("key must map names to texts")
    if not is_utf8("\0".join([*value.keys(), *value.values()])):
        raise ManifestMalformed("key has a text that UTF-8 cannot write")
    if bool(value) != (layout == "runtime"):
        raise ManifestMalformed(f"a checkpoint of layout {layout} must {'not ' if value else ''}have a key")
    if value and not value.keys() >= {CHECKPOINT, ENGINE, ENGINE_VERSION}:
        raise ManifestMalformed(f"the key of a runtime layout must have {CHECKPOINT}, {ENGINE} and {ENGINE_VERSION}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ManifestMalformed(f"{what} must be a list")
    return value


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:  # True is an int too
        raise ManifestMalformed(f"{what} is not a count")
    return value


def _sha256(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ManifestMalformed(f"{what}: its sha256 is not 64 hexadecimal digits")
    return value
