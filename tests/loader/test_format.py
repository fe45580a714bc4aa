"""The manifest: what is written is read again, and everything else has an error of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm import errors
from sllm.errors import InvalidCheckpoint, SllmError, UnsupportedCheckpoint
from sllm.loader.dtypes import ITEM_BYTES
from sllm.loader.format import (
    LARGE_BYTES,
    MAX_MANIFEST_BYTES,
    PACKED_BYTES,
    PAGE_BYTES,
    Manifest,
    ModelFacts,
    Partition,
    StoredFile,
    Tensor,
    chunk_bytes_for,
    contiguous,
    parse,
    place,
    span_bytes,
    to_bytes,
)

Body = dict[str, Any]
KEY = {"checkpoint": "sha256:0", "engine": "vllm", "engine_version": "1"}  # the least that a runtime layout says


def manifest_of(tensors: dict[str, Tensor], partitions: int = 1, pages: int = 4, **changes: Any) -> Manifest:
    rows = tuple(
        Partition(
            file=f"partition-{n:03d}.bin", size_bytes=pages * PAGE_BYTES, sha256="ab" * 32, chunks=("0123456789abcdef",)
        )
        for n in range(partitions)
    )
    return Manifest(partitions=rows, tensors=tensors, chunk_bytes=1 << 20, **changes)


SAMPLE = manifest_of(
    {
        "embed": Tensor(0, 0, 32, "float32", (4, 2), (2, 1)),
        "head": Tensor(0, 0, 32, "float32", (4, 2), (2, 1)),  # tied
        "scale": Tensor(0, 64, 2, "bfloat16", (), ()),
        "empty": Tensor(1, 128, 0, "int64", (0, 3), (3, 1)),
        "turned": Tensor(1, 128, 24, "complex64", (1, 3), (1, 1)),
    },
    partitions=2,
    model=ModelFacts(architecture="LlamaForCausalLM", max_model_len=128),
    execution_files=(
        StoredFile(path="config.json", size_bytes=3, sha256="01" * 32),
        StoredFile(path="tokenizer.json", size_bytes=0, sha256="02" * 32),
    ),
    source="/models/sample",
    created_at=1.5,
)


def changed(change: Callable[[Body], None], manifest: Manifest = SAMPLE) -> bytes:
    """Return a manifest with its body changed, and the digest of that: as a hostile writer would."""
    header, body = to_bytes(manifest).split(b"\n", 1)
    values = json.loads(b"{" + body)
    change(values)
    return signed(header, json.dumps(values).encode()[1:])


def signed(header: bytes, body: bytes) -> bytes:
    values = json.loads(header[:-1] + b"}")
    values["digest"] = f"sha256:{hashlib.sha256(body).hexdigest()}"
    return json.dumps(values).encode()[:-1] + b",\n" + body


def with_header(**changes: Any) -> bytes:
    header, body = to_bytes(SAMPLE).split(b"\n", 1)
    values = {**json.loads(header[:-1] + b"}"), **changes}
    return json.dumps({name: value for name, value in values.items() if value is not ...}).encode()[:-1] + b",\n" + body


def test_what_is_written_is_read_again() -> None:
    found = parse(to_bytes(SAMPLE))
    assert found == replace(SAMPLE, digest=found.digest)
    assert list(found.tensors) == list(SAMPLE.tensors)
    assert all(isinstance(tensor, Tensor) for tensor in found.tensors.values())


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Manifests of tensors of all dtypes and shapes, with gaps and sharing."""
    dtype = st.sampled_from(sorted(ITEM_BYTES))
    dimensions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20)), max_size=4)
    tensors = {}
    for name in draw(st.lists(st.text(max_size=8), unique=True, max_size=6)):
        kind, steps = draw(dtype), draw(dimensions)
        shape, stride = tuple(n for n, _ in steps), tuple(step for _, step in steps)
        offset = draw(st.integers(0, 100)) * ITEM_BYTES[kind]
        size = span_bytes(kind, shape, stride)
        tensors[name] = Tensor(draw(st.integers(0, 1)), offset, size, kind, shape, stride)
    runtime = draw(st.booleans())
    return manifest_of(
        tensors,
        partitions=2,
        layout="runtime" if runtime else "hf",
        key={**draw(st.dictionaries(st.text(), st.text())), **KEY} if runtime else {},
        source=draw(st.text()),
        created_at=draw(st.floats(0, 1e12)),
    )


@given(manifests())
def test_any_manifest_is_read_as_it_was_written(manifest: Manifest) -> None:
    data = to_bytes(manifest)
    found = parse(data)
    assert found == replace(manifest, digest=found.digest)
    assert to_bytes(found) == data


def test_the_digest_names_the_content_and_nothing_else() -> None:
    digest = parse(to_bytes(SAMPLE)).digest
    assert parse(to_bytes(replace(SAMPLE, source="elsewhere", created_at=9.0))).digest == digest
    assert parse(to_bytes(replace(SAMPLE, model=None))).digest != digest
    reordered = dict(reversed(SAMPLE.tensors.items()))
    assert parse(to_bytes(replace(SAMPLE, tensors=reordered))).digest != digest


def test_a_manifest_that_no_reader_would_take_is_not_written() -> None:
    with pytest.raises(UnsupportedCheckpoint, match=f"more than {MAX_MANIFEST_BYTES}"):
        to_bytes(replace(SAMPLE, source="x" * MAX_MANIFEST_BYTES))


def test_what_a_runtime_layout_must_say_is_enough() -> None:
    assert dict(parse(changed(runtime_with(KEY))).key) == KEY


def test_offsets_beyond_four_gigabytes_are_offsets() -> None:
    size = 5 << 30
    chunk_bytes = chunk_bytes_for(size)
    partition = Partition(
        file="partition-000.bin", size_bytes=size, sha256="00" * 32, chunks=("0" * 16,) * (size // chunk_bytes)
    )
    tensor = Tensor(0, 1 << 31, 3 << 30, "uint8", (3 << 30,), (1,))
    manifest = Manifest(partitions=(partition,), tensors={"w": tensor}, chunk_bytes=chunk_bytes)
    assert parse(to_bytes(manifest)).tensors["w"] == tensor


def test_large_tensors_begin_at_pages_and_small_ones_are_packed() -> None:
    offsets, size = place([2, LARGE_BYTES, 0, 100, LARGE_BYTES - 1, LARGE_BYTES])
    assert offsets == (0, 4096, 69632, 69632, 69760, 139264)
    assert size == offsets[-1] + LARGE_BYTES


@given(st.lists(st.integers(0, 3 * LARGE_BYTES), max_size=20))
def test_places_are_aligned_in_order_and_apart(sizes: list[int]) -> None:
    offsets, end = place(sizes)
    before = 0
    for size, offset in zip(sizes, offsets, strict=True):
        assert before <= offset < before + PAGE_BYTES
        assert offset % (PAGE_BYTES if size >= LARGE_BYTES else PACKED_BYTES) == 0
        before = offset + size
    assert end % PAGE_BYTES == 0
    assert before <= end < before + PAGE_BYTES + PACKED_BYTES


@given(st.lists(st.integers(0, 5), max_size=4))
def test_a_contiguous_tensor_spans_its_elements(shape: list[int]) -> None:
    count = 1
    for n in shape:
        count *= n
    assert span_bytes("int16", tuple(shape), contiguous(tuple(shape))) == 2 * count


# --- every way in which a manifest can be wrong ---------------------------------------------------


def put(*path: Any, to: Any) -> Callable[[Body], None]:
    """Return a change that sets one place of the body; `...` removes it."""

    def change(body: Body) -> None:
        place: Any = body
        for step in path[:-1]:
            place = place[step]
        if to is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = to

    return change


def runtime_with(key: dict[str, str]) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        body.update(layout="runtime", key=key)

    return change


NOT_COUNTS = [-1, True, 1.0, "1", None, [], 1 << 62]
MALFORMED: dict[str, Callable[[Body], None]] = {
    **{f"without {name}": put(name, to=...) for name in sorted(json.loads(b"{" + to_bytes(SAMPLE).split(b"\n", 1)[1]))},
    "with more": put("more", to=1),
    **{f"chunk_bytes {value!r}": put("chunk_bytes", to=value) for value in (*NOT_COUNTS, 0, 4095, 3 << 12, 16 << 20)},
    **{f"layout {value!r}": put("layout", to=value) for value in ("other", 1, None, [])},
    "runtime without a key": put("layout", to="runtime"),
    "hf with a key": put("key", to=KEY),
    **{
        f"runtime without {name}": runtime_with({other: text for other, text in KEY.items() if other != name})
        for name in KEY
    },
    **{f"key {value!r}": put("key", to=value) for value in ([], {"a": 1}, "x", None)},
    **{f"model {value!r}": put("model", to=value) for value in ([], {}, {"architecture": "x"}, "x")},
    **{
        f"architecture {value!a}": put("model", "architecture", to=value)
        for value in (3, None, "", "X\n", "\x1b[2J", "\ud800", "X" * 257)
    },
    **{f"key {key!a}": runtime_with({**KEY, **key}) for key in ({"\ud800": ""}, {"rank": "\udfff"})},
    **{f"max_model_len {value!r}": put("model", "max_model_len", to=value) for value in NOT_COUNTS},
    **{f"partitions {value!r}": put("partitions", to=value) for value in ([], {}, None, [1], [{}])},
    "a partition without sha256": put("partitions", 0, "sha256", to=...),
    "a partition with more": put("partitions", 0, "more", to=1),
    **{
        f"partition file {value!r}": put("partitions", 0, "file", to=value)
        for value in ("partition-001.bin", "../partition-000.bin", "/etc/passwd", "partition-000.bin\n", "", 3, None)
    },
    **{
        f"partition size {value!r}": put("partitions", 0, "size_bytes", to=value) for value in (*NOT_COUNTS, 1, 1 << 40)
    },
    **{f"sha256 {value!r}": put("partitions", 0, "sha256", to=value) for value in ("", "AB" * 32, "ab" * 33, 1)},
    **{
        f"chunks {value!r}": put("partitions", 0, "chunks", to=value)
        for value in ([], ["0" * 16] * 2, ["0" * 15], ["G" * 16], ["0" * 16 + "\n"], [1], "0123456789abcdef", None)
    },
    **{f"execution files {value!r}": put("execution_files", to=value) for value in ({}, None, [1], [{}])},
    **{
        f"execution file {value!r}": put("execution_files", 0, "path", to=value)
        for value in (
            "",
            ".",
            "..",
            ".hidden",
            ".quarantined",
            "a/b",
            "../x",
            "/x",
            "a\nb",
            "\x1b[2J",
            "\ud800",
            "manifest.json",
            "partition-007.bin",
            1,
            None,
        )
    },
    "an execution file twice": put("execution_files", 1, "path", to="config.json"),
    "execution files unsorted": put("execution_files", 0, "path", to="z.json"),
    **{f"execution size {value!r}": put("execution_files", 0, "size_bytes", to=value) for value in NOT_COUNTS},
    "execution sha256": put("execution_files", 0, "sha256", to="x"),
    **{f"kinds {value!r}": put("kinds", to=value) for value in ({}, None, [1], [[]], [[1, "uint8", [1]]])},
    **{f"kind size {value!r}": put("kinds", 0, 0, to=value) for value in NOT_COUNTS},
    **{f"dtype {value!r}": put("kinds", 0, 1, to=value) for value in (1, None, ["float32"])},
    **{
        f"shape {value!r}": put("kinds", 0, 2, to=value)
        for value in ([-1, 2], [True, 2], [4.0, 2], [4], [4, 2, 1], {}, None, "42", [1 << 62, 0])
    },
    "65 dimensions": put("kinds", 0, to=[4, "float32", [1] * 65, [1] * 65]),
    **{f"stride {value!r}": put("kinds", 0, 3, to=value) for value in ([-2, 1], [2], None, [1.5, 1])},
    **{f"tensors {value!r}": put("tensors", to=value) for value in ([], None, {}, {"names": []})},
    "tensors with more": put("tensors", "more", to=[]),
    **{
        f"{column} {value!r}": put("tensors", column, to=value)
        for column in ("names", "partitions", "offsets", "kinds")
        for value in ({}, None, [], "embed", [0, 0, 0, 0])
    },
    **{
        f"{column} holds {value!r}": put("tensors", column, 0, to=value)
        for column in ("partitions", "offsets", "kinds")
        for value in NOT_COUNTS
    },
    "a name twice": put("tensors", "names", 0, to="head"),
    **{f"a name {value!r}": put("tensors", "names", 0, to=value) for value in (1, None, True, ["a"])},
    **{f"a name {value!a}": put("tensors", "names", 0, to=value) for value in ("\ud800", "\udc00w")},
    "a kind that is not there": put("tensors", "kinds", 0, to=99),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_the_format_does_not_allow_is_malformed(change: Callable[[Body], None]) -> None:
    with pytest.raises(errors.ManifestMalformed):
        parse(changed(change))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (put("kinds", 0, 1, to="float33"), errors.UnknownDtype),
        (put("kinds", 0, 1, to="__class__"), errors.UnknownDtype),
        (put("kinds", 0, 0, to=31), errors.TensorMisdescribed),
        (put("kinds", 0, 2, to=[4, 3]), errors.TensorMisdescribed),
        (put("kinds", 0, 3, to=[3, 1]), errors.TensorMisdescribed),
        (put("kinds", 2, 0, to=8), errors.TensorMisdescribed),  # an empty one that has bytes
        (put("kinds", 0, to=[4, "float32", [1 << 32, 1 << 31], [0, 0]]), errors.TensorMisdescribed),
        (put("kinds", 0, to=[0, "float32", [1 << 40, 1 << 40, 0], [0, 0, 0]]), errors.TensorMisdescribed),
        (put("kinds", 0, to=[4 << 62, "float32", [1 << 61, 2], [0, 1]]), errors.ManifestMalformed),
        (put("kinds", 0, to=[0, "float32", [1 << 61, 1 << 61], [1 << 61, 1 << 61]]), errors.TensorMisdescribed),
        (put("tensors", "partitions", 0, to=2), errors.TensorMisplaced),
        (put("tensors", "offsets", 0, to=4 * PAGE_BYTES - 28), errors.TensorMisplaced),
        (put("tensors", "offsets", 0, to=(1 << 62) - 4), errors.TensorMisplaced),
        (put("tensors", "offsets", 0, to=2), errors.TensorMisplaced),
        (put("tensors", "offsets", 3, to=4 * PAGE_BYTES + 8), errors.TensorMisplaced),  # an empty one, too
    ],
)
def test_a_tensor_that_cannot_be_is_refused(change: Callable[[Body], None], error: type[SllmError]) -> None:
    with pytest.raises(error):
        parse(changed(change))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", errors.ManifestMalformed),
        (b"{}", errors.ManifestMalformed),
        (b"\n", errors.ManifestMalformed),
        (b"{},\n", errors.ManifestMalformed),
        (b"[1,\n]", errors.ManifestMalformed),
        (b"\xff,\n", errors.ManifestMalformed),
        (b"[" * 100_000 + b",\n", errors.ManifestMalformed),
        (to_bytes(SAMPLE)[:-2], errors.ManifestCorrupt),
        (to_bytes(SAMPLE) + b" ", errors.ManifestCorrupt),
        (with_header(format="other"), errors.ManifestMalformed),
        (with_header(version=2, digest="", more=1), errors.FormatTooNew),
        (with_header(version=0), errors.ManifestMalformed),
        (with_header(version="1"), errors.ManifestMalformed),
        (with_header(version=True), errors.ManifestMalformed),
        (with_header(version=...), errors.ManifestMalformed),
        (with_header(digest="sha256:0"), errors.ManifestCorrupt),
        (with_header(digest=None), errors.ManifestMalformed),
        (with_header(digest=...), errors.ManifestMalformed),
        (with_header(source=3), errors.ManifestMalformed),
        (with_header(source="\ud800"), errors.ManifestMalformed),
        (with_header(source=...), errors.ManifestMalformed),
        (with_header(more=1), errors.ManifestMalformed),
        (with_header(created_at="now"), errors.ManifestMalformed),
        (with_header(created_at=True), errors.ManifestMalformed),
        (with_header(created_at=-1), errors.ManifestMalformed),
        (with_header(created_at=float("nan")), errors.ManifestMalformed),
        (with_header(created_at=float("inf")), errors.ManifestMalformed),
        (with_header(created_at=10**400), errors.ManifestMalformed),
        (with_header(created_at=1 << 62), errors.ManifestMalformed),
        (with_header(created_at=...), errors.ManifestMalformed),
    ],
)
def test_a_header_that_is_none_is_refused(data: bytes, error: type[SllmError]) -> None:
    with pytest.raises(error):
        parse(data)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"}",
        b"1}",
        b'"layout":"hf","layout":"hf"}',
        b'"a":' + b"[" * 100_000,
        b'"a":' + b"1" * 5000 + b"}",
        b'"a":"\xff"}',
    ],
)
def test_a_body_that_is_no_manifest_is_malformed(body: bytes) -> None:
    header = to_bytes(SAMPLE).split(b"\n", 1)[0]
    with pytest.raises(errors.ManifestMalformed):
        parse(signed(header, body))


@given(st.data())
def test_a_manifest_with_flipped_bytes_is_refused_or_the_same(data: st.DataObject) -> None:
    good = to_bytes(SAMPLE)
    bad = bytearray(good)
    for position in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=4)):
        bad[position] = data.draw(st.integers(0, 255))
    try:
        found = parse(bytes(bad))
    except (InvalidCheckpoint, UnsupportedCheckpoint):
        return
    # Only what is outside the digest can have changed.
    expected = parse(good)
    assert replace(found, source=expected.source, created_at=expected.created_at) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 63) | st.floats() | st.text(max_size=4) | st.just("float32"),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_a_signed_manifest_with_any_value_anywhere_is_refused_or_lies_in_its_partitions(data: st.DataObject) -> None:
    def change(body: Body) -> None:
        place: Any = body
        while True:
            step = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            deeper = place[step]
            if not isinstance(deeper, (dict, list)) or not deeper or data.draw(st.booleans()):
                place[step] = data.draw(json_values)
                return
            place = deeper

    try:
        found = parse(changed(change))
    except (InvalidCheckpoint, UnsupportedCheckpoint):
        return
    for tensor in found.tensors.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.size_bytes <= found.partitions[tensor.partition].size_bytes
        assert tensor.size_bytes == span_bytes(tensor.dtype, tensor.shape, tensor.stride)
