"""Which folders are taken for a checkpoint, and why others are not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.errors import InvalidArgument, InvalidCheckpoint, NotFound
from sllm.loader.source import MAX_EXECUTION_FILE_BYTES, examine, locate


def test_finds_shards_execution_files_and_facts(model: Path) -> None:
    (model / "notes").mkdir()
    (model / ".gitattributes").write_text("x")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "modeling_x.py").write_text("code")
    source = examine(model)
    assert [file.path for file in source.shards] == ["model.safetensors"]
    assert [file.path for file in source.execution_files] == ["config.json", "tokenizer.json"]
    assert (source.facts.architecture, source.facts.max_model_len) == ("LlamaForCausalLM", 128)
    assert len(source.tensors) == 4


def test_takes_the_shards_that_the_index_names_and_no_others(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"another form of the same weights")
    assert len(examine(sharded).shards) == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"n_positions": 77}, 77), ({"text_config": {"max_position_embeddings": 99}}, 99), ({}, 2048)],
)
def test_reads_the_length_by_any_of_its_names(model: Path, config: dict[str, Any], expected: int) -> None:
    (model / "config.json").write_text(json.dumps({"architectures": ["X"], **config}))
    assert examine(model).facts.max_model_len == expected


def test_a_source_must_exist_and_be_a_folder_under_a_root(model: Path, tmp_path: Path) -> None:
    assert locate(str(model), [tmp_path]) == model
    with pytest.raises(NotFound, match="not there"):
        locate(str(tmp_path / "nowhere"), [tmp_path])
    with pytest.raises(InvalidArgument, match="not a folder"):
        locate(str(model / "config.json"), [tmp_path])
    with pytest.raises(InvalidArgument, match="not an absolute path"):
        locate("source", [tmp_path])
    with pytest.raises(InvalidArgument, match="outside"):
        locate(str(model), [tmp_path / "elsewhere"])
    with pytest.raises(InvalidArgument, match="outside"):
        locate(f"{model}/../../../etc", [tmp_path])


def test_a_link_does_not_lead_out_of_the_roots(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "way-out").symlink_to(model)
    with pytest.raises(InvalidArgument, match="outside"):
        locate(str(root / "way-out"), [root])


def test_refuses_pickle_and_says_why(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InvalidCheckpoint, match=r"pickle \(pytorch_model.bin\).*runs any code"):
        examine(model)


def test_refuses_a_folder_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match="no safetensors file"):
        examine(model)


def test_refuses_a_checkpoint_without_tensors(model: Path, packed: Callable[..., bytes]) -> None:
    (model / "model.safetensors").write_bytes(packed({}))
    with pytest.raises(InvalidCheckpoint, match="no tensors"):
        examine(model)


def test_refuses_a_folder_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"no config\.json"):
        examine(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "names no architecture"),
        (b'{"architectures": []}', "names no architecture"),
        (b'{"architectures": [3]}', "names no architecture"),
    ],
)
def test_refuses_a_wrong_config(model: Path, config: bytes, message: str) -> None:
    (model / "config.json").write_bytes(config)
    with pytest.raises(InvalidCheckpoint, match=message):
        examine(model)


def test_refuses_a_truncated_shard(model: Path) -> None:
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors is truncated"):
        examine(model)


def test_refuses_an_index_that_names_an_absent_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"model-00002-of-00002\.safetensors .* not there"):
        examine(sharded)


def test_refuses_an_index_that_names_an_absent_tensor(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(InvalidCheckpoint, match=r"model\.ghost"):
        examine(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_refuses_an_index_without_a_map(sharded: Path, index: Any) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidCheckpoint, match="no weight_map"):
        examine(sharded)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "weights.bin", 3])
def test_refuses_an_index_that_leads_elsewhere(sharded: Path, shard: Any) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(InvalidCheckpoint, match="no shard's name"):
        examine(sharded)


def test_refuses_a_tensor_that_two_shards_hold(model: Path, packed: Callable[..., bytes]) -> None:
    (model / "more.safetensors").write_bytes(packed({"model.scale": ("BF16", [], b"\x80\x3f")}))
    with pytest.raises(InvalidCheckpoint, match=r"'model\.scale' is in model\.safetensors and in more\.safetensors"):
        examine(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "extra.safetensors", "config.json"])
def test_refuses_a_link_that_leaves_the_folder(model: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "secret"
    outside.write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    with pytest.raises(InvalidCheckpoint, match=f"{name} is a link that leads out"):
        examine(model)


def cached(model: Path, cache: Path) -> Path:
    """The layout of a Hugging Face cache: snapshots of links into blobs."""
    snapshot = cache / "models--org--name" / "snapshots" / "0a1b"
    blobs = cache / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_in_a_hugging_face_cache_may_use_its_blobs(model: Path, tmp_path: Path) -> None:
    expected = examine(model)
    snapshot = cached(model, tmp_path / "hub")
    assert examine(snapshot, [tmp_path]).tensors == expected.tensors


def test_a_snapshot_may_use_nothing_beyond_its_repository_nor_beyond_the_roots(model: Path, tmp_path: Path) -> None:
    snapshot = cached(model, tmp_path / "hub")
    with pytest.raises(InvalidCheckpoint, match="leads out"):
        examine(snapshot, [snapshot])
    (snapshot / "config.json").unlink()
    (tmp_path / "hub" / "config.json").write_text("{}")
    (snapshot / "config.json").symlink_to("../../../config.json")
    with pytest.raises(InvalidCheckpoint, match="leads out"):
        examine(snapshot, [tmp_path])


def test_follows_a_link_within_the_folder(model: Path) -> None:
    (model / "model.safetensors").rename(model / "data")
    (model / "model.safetensors").symlink_to("data")
    (model / "config.json").rename(model / "config-v2.json")
    (model / "config.json").symlink_to("config-v2.json")
    assert len(examine(model).tensors) == 4


def test_refuses_what_is_not_a_regular_file_without_hanging(model: Path) -> None:
    os.mkfifo(model / "extra.safetensors")
    with pytest.raises(InvalidCheckpoint, match="not a regular file"):
        examine(model)


@pytest.mark.parametrize("name", [b"new\nline.json", b"\xff.json"])
def test_refuses_a_name_that_cannot_be_shown(model: Path, name: bytes) -> None:
    (model / os.fsdecode(name)).touch()
    with pytest.raises(InvalidCheckpoint, match="unprintable"):
        examine(model)


def test_refuses_a_large_file_that_is_no_weight(model: Path) -> None:
    with open(model / "huge.json", "wb") as file:
        file.truncate(MAX_EXECUTION_FILE_BYTES + 1)
    with pytest.raises(InvalidCheckpoint, match=r"huge\.json has"):
        examine(model)
