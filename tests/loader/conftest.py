"""Checkpoints made by hand, right and wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Tensors = dict[str, tuple[str, list[int], bytes]]

SMALL: Tensors = {
    "model.embed.weight": ("F32", [4, 2], bytes(range(32))),
    "model.scale": ("BF16", [], b"\x80\x3f"),
    "model.empty": ("I64", [0, 3], b""),
    "lm_head.weight": ("F16", [3], b"abcdef"),
}


def pack(tensors: Tensors, **metadata: str) -> bytes:
    """Return a safetensors file."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return pack_raw(json.dumps(header).encode(), data)


def pack_raw(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.fixture
def packed() -> Callable[..., bytes]:
    return pack


@pytest.fixture
def packed_raw() -> Callable[[bytes, bytes], bytes]:
    return pack_raw


@pytest.fixture
def small_tensors() -> Tensors:
    return dict(SMALL)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that is in order: one shard, no index."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128})
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(pack(SMALL, format="pt"))
    return folder


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in two shards with an index."""
    (model / "model.safetensors").unlink()
    halves = [dict(list(SMALL.items())[:2]), dict(list(SMALL.items())[2:])]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        (model / name).write_bytes(pack(half))
        weight_map.update(dict.fromkeys(half, name))
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model
