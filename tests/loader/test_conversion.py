"""Conversion: whatever safetensors holds is in the checkpoint, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sllm.errors import (
    Cancelled,
    ChunkCorrupt,
    Conflict,
    ExecutionFileDamaged,
    InvalidCheckpoint,
    ManifestMalformed,
    NotFound,
    UnsupportedCheckpoint,
)
from sllm.loader import convert, load, save, verify
from sllm.loader.folder import read_manifest
from sllm.loader.format import LARGE_BYTES, PAGE_BYTES, to_bytes

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.float4_e2m1fn_x2,
)


def bytes_of(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return bytes(tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).tolist())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape, bytes_of(one)) == (other.dtype, other.shape, bytes_of(other))


@st.composite
def contents(draw: st.DrawFn) -> tuple[torch.dtype, list[int], bytes]:
    """What a tensor is made of: torch cannot print all tensors, and Hypothesis prints its examples."""
    dtype = draw(st.sampled_from(DTYPES))
    least = 1 if dtype is torch.float4_e2m1fn_x2 else 0  # safetensors counts its halves: it has no scalars
    shape = draw(st.lists(st.integers(0, 5), min_size=least, max_size=4))
    count = int(torch.Size(shape).numel())
    content = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        content = bytes(byte & 1 for byte in content)
    return dtype, shape, content


def tensor_of(dtype: torch.dtype, shape: list[int], content: bytes) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=6), contents(), max_size=5), min_size=1, max_size=3))
def test_every_dtype_and_shape_is_what_safetensors_itself_loads(shards: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, expected = Path(folder, "source"), {}
        source.mkdir()
        for number, shard in enumerate(shards):
            fresh = {name: tensor_of(*made) for name, made in shard.items() if name not in expected}
            file = source / f"model-{number}.safetensors"
            save_file(fresh, file)
            expected |= load_file(file)
        if not expected:
            return
        convert(source, Path(folder, "checkpoint"))
        found = load(Path(folder, "checkpoint"))
        assert found.keys() == expected.keys()
        assert all(same(found[name], tensor) for name, tensor in expected.items())


def test_one_shard_or_many_make_the_same_checkpoint(model: Path, tmp_path: Path, request: Any) -> None:
    one = convert(model, tmp_path / "one")
    sharded = request.getfixturevalue("sharded")
    many = convert(sharded, tmp_path / "many")
    assert many.digest == one.digest
    assert {path.name for path in (tmp_path / "many").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_the_same_source_has_the_same_digest_wherever_and_whenever(model: Path, tmp_path: Path) -> None:
    first = convert(model, tmp_path / "first")
    again = convert(model.rename(tmp_path / "elsewhere"), tmp_path / "again")
    assert again.digest == first.digest
    assert again.source != first.source
    (tmp_path / "elsewhere" / "tokenizer.json").write_text("[]")
    assert convert(tmp_path / "elsewhere", tmp_path / "again").digest != first.digest


def test_execution_files_and_facts_come_along_unchanged(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"\r\n{{ x }}\xff")
    manifest = convert(model, tmp_path / "c")
    assert manifest.model
    assert (manifest.model.architecture, manifest.model.max_model_len) == ("LlamaForCausalLM", 128)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "c" / name).read_bytes() == (model / name).read_bytes()
    assert verify(tmp_path / "c", deep=True).files == 3


def test_tensors_lie_in_the_order_of_shards_and_offsets_large_ones_at_pages(
    model: Path, packed: Callable[..., bytes], tmp_path: Path
) -> None:
    def row(size: int) -> tuple[str, list[int], bytes]:
        return ("U8", [size], bytes(size))

    (model / "model.safetensors").write_bytes(packed({"z": row(3), "a": row(LARGE_BYTES)}))
    (model / "more.safetensors").write_bytes(packed({"m": row(LARGE_BYTES), "b": row(5)}))
    manifest = convert(model, tmp_path / "c")
    assert list(manifest.tensors) == ["z", "a", "m", "b"]
    assert [t.offset for t in manifest.tensors.values()] == [
        *(0, PAGE_BYTES, PAGE_BYTES + LARGE_BYTES),
        PAGE_BYTES + 2 * LARGE_BYTES,
    ]


def test_a_folder_that_is_no_models_may_be_converted_by_the_library(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text('{"peft_type": "LORA"}')
    assert convert(model, tmp_path / "c").model is None
    (model / "config.json").unlink()
    assert convert(model, tmp_path / "c").model is None


def test_a_source_may_be_named_by_a_link_and_lie_in_a_cache_of_links(model: Path, tmp_path: Path) -> None:
    expected = convert(model, tmp_path / "c").digest
    (tmp_path / "link").symlink_to(model)
    assert convert(tmp_path / "link", tmp_path / "c").digest == expected
    cache = tmp_path / "hub" / "models--x"
    (cache / "snapshots" / "1").mkdir(parents=True)
    model.rename(cache / "blobs")
    for file in (cache / "blobs").iterdir():
        (cache / "snapshots" / "1" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert convert(cache / "snapshots" / "1", tmp_path / "c").digest == expected


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_source_that_is_no_folder_is_said_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotFound, match=name):
        convert(tmp_path / name, tmp_path / "c")


def test_progress_goes_up_to_the_total(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = convert(model, tmp_path / "c", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (manifest.stored_bytes, manifest.stored_bytes)


def test_a_conversion_that_is_called_off_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        convert(model, tmp_path / "c", cancelled=lambda: True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    size = 256 << 20
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # a hole: it takes no room
    code = (
        "import resource, sys; from sllm.loader import convert; before = resource.getrusage(0).ru_maxrss;"
        "convert(*sys.argv[1:]); print((resource.getrusage(0).ru_maxrss - before) << 10)"
    )
    done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "c"], capture_output=True, check=True)
    assert int(done.stdout) < 64 << 20


# --- a checkpoint as the source -------------------------------------------------------------------


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    convert(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_is_copied_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    before = read_manifest(checkpoint)
    assert convert(checkpoint, tmp_path / "copy").digest == before.digest
    assert verify(tmp_path / "copy", deep=True).manifest.tensors == before.tensors


def test_a_checkpoint_with_several_partitions_and_other_chunks_is_copied_as_it_is(tmp_path: Path) -> None:
    from sllm.loader.writing import CheckpointWriter

    with CheckpointWriter(tmp_path / "c", [9 << 20, 0, PAGE_BYTES], chunk_bytes=8 << 20) as writer:
        for seed in (b"a", b"", b"b"):
            with writer.partition() as partition:
                partition.write(seed * 100)
        before = writer.commit({})
    assert convert(tmp_path / "c", tmp_path / "copy").digest == before.digest


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "error"), [("partition-000.bin", ChunkCorrupt), ("tokenizer.json", ExecutionFileDamaged)]
)
def test_a_damaged_checkpoint_is_not_copied(
    checkpoint: Path, tmp_path: Path, name: str, error: type[Exception]
) -> None:
    (checkpoint / "tokenizer.json").write_text('{"a": 1234}')
    convert(checkpoint.parent / "source", checkpoint)
    if name == "tokenizer.json":
        (checkpoint / name).write_text("[]")
    else:
        flip(checkpoint / name)
    with pytest.raises(error):
        convert(checkpoint, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_forged_chunk_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    """Its hash in the manifest is forged too, but not the sha256 of its partition."""
    manifest = read_manifest(checkpoint)
    forged = tuple(replace(partition, sha256="00" * 32) for partition in manifest.partitions)
    (checkpoint / "manifest.json").write_bytes(to_bytes(replace(manifest, partitions=forged)))
    with pytest.raises(ChunkCorrupt, match="sha256"):
        convert(checkpoint, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_manifest_that_says_the_same_in_other_words_is_refused_as_a_source(checkpoint: Path, tmp_path: Path) -> None:
    import hashlib

    header, body = (checkpoint / "manifest.json").read_bytes().split(b"\n", 1)
    body = body.replace(b":", b": ", 1)
    fields = json.loads(header[:-1] + b"}") | {"digest": f"sha256:{hashlib.sha256(body).hexdigest()}"}
    (checkpoint / "manifest.json").write_bytes(json.dumps(fields).encode()[:-1] + b",\n" + body)
    verify(checkpoint)
    with pytest.raises(ManifestMalformed, match="one way"):
        convert(checkpoint, tmp_path / "copy")


def test_an_engines_own_layout_is_no_source(tmp_path: Path) -> None:
    key = {"checkpoint": "sha256:0", "engine": "x", "engine_version": "1"}
    save({"w": torch.ones(3)}, tmp_path / "c", layout="runtime", key=key)
    with pytest.raises(UnsupportedCheckpoint, match="engine's own"):
        convert(tmp_path / "c", tmp_path / "copy")


def test_a_source_is_not_replaced_by_itself(model: Path) -> None:
    with pytest.raises(Conflict):
        convert(model, model)
    assert (model / "model.safetensors").exists()


def test_a_checkpoint_may_be_replaced_by_a_copy_of_itself(checkpoint: Path) -> None:
    before = read_manifest(checkpoint)
    assert convert(checkpoint, checkpoint).digest == before.digest
    verify(checkpoint, deep=True)


def test_a_shard_that_shrinks_while_it_is_read_is_said_so(model: Path, tmp_path: Path) -> None:
    def shrink(done: int, total: int) -> None:
        os.truncate(model / "model.safetensors", 1 << 20)

    save_file({"w": torch.zeros(9 << 20, dtype=torch.uint8)}, model / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match="became shorter"):
        convert(model, tmp_path / "c", progress=shrink)
    assert not (tmp_path / "c").exists()
