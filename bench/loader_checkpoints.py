"""The checkpoints that loaders are measured on: shapes of real models, incompressible numbers, one content per format.

Tensors are made one shard at a time, so that a checkpoint larger than memory can be written. Everything is bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate, groupby
from math import prod
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]
Shapes = Iterator[tuple[str, tuple[int, ...]]]

SHARD_BYTES = 2_000_000_000
ITEM_BYTES = 2


def llama(layers: int, hidden: int, inner: int, query: int, key: int, vocabulary: int, *, tied: bool = False) -> Shapes:
    """Yield names and shapes of a Llama-like model; `query` and `key` are the widths of those projections."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (query, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (key, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (key, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, query)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocabulary, hidden)


def lora(layers: int, hidden: int, inner: int, rank: int) -> Shapes:
    """Yield names and shapes of an adapter on every projection of a model."""
    widths = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(layers):
        for module, (outputs, inputs) in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            yield f"{prefix}.lora_A.weight", (rank, inputs)
            yield f"{prefix}.lora_B.weight", (outputs, rank)


def mixture(layers: int, experts: int, hidden: int, inner: int, vocabulary: int) -> Shapes:
    """Yield names and shapes of a mixture of many small experts."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (hidden // 3, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (hidden // 3, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate.weight", (experts, hidden)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for expert in range(experts):
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


KINDS: dict[str, Callable[[], Shapes]] = {
    "tiny": lambda: llama(2, 256, 688, 256, 128, 4000),  # 7 MB: warms a loader up, and stands in for all with --quick
    "many": lambda: mixture(2, 64, 96, 24, 512),  # 2 MB, 400 tensors: the same for "moe"
    "small": lambda: llama(8, 1024, 2816, 1024, 512, 16000),  # 0.26 GB: one of twenty
    "1b": lambda: llama(28, 1024, 3072, 2048, 1024, 151936, tied=True),  # Qwen3-0.6B-like: 1.2 GB
    "5gb": lambda: llama(11, 4096, 11008, 4096, 4096, 32000),  # Llama-2-7B, a third of its layers
    "lora": lambda: lora(32, 2560, 6912, 32),  # 100 MB, 448 tensors
    "moe": lambda: mixture(26, 128, 768, 96, 8000),  # 1.6 GB, 10,143 tensors
}


def size_of(kind: str) -> int:
    """Return the bytes of all tensors of a kind."""
    return sum(ITEM_BYTES * prod(shape) for _, shape in KINDS[kind]())


def count_of(kind: str) -> int:
    return sum(1 for _ in KINDS[kind]())


def shards(kind: str, salt: int) -> Iterator[Tensors]:
    """Yield the tensors, at most SHARD_BYTES at a time; `salt` tells apart two checkpoints of one kind."""
    source = _noise()
    for shard in _split(kind):
        yield {name: _cut(source, shape, salt * 100_003 + number) for number, (name, shape) in shard}


def _split(kind: str) -> list[list[tuple[int, tuple[str, tuple[int, ...]]]]]:
    """Return the numbered names and shapes of each shard."""
    ends = accumulate(ITEM_BYTES * prod(shape) for _, shape in KINDS[kind]())
    numbered = zip(ends, enumerate(KINDS[kind]()), strict=True)
    return [[row for _, row in shard] for _, shard in groupby(numbered, key=lambda each: each[0] // SHARD_BYTES)]


@cache
def _noise() -> torch.Tensor:
    """Return 32 MB of incompressible weights, from which all others are cut: randn for each would take minutes."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1 << 24, generator=generator) * 0.02).to(torch.bfloat16)


def _cut(source: torch.Tensor, shape: tuple[int, ...], salt: int) -> torch.Tensor:
    count = prod(shape)
    start = salt * 1_000_003 % (source.numel() // 2)
    piece = source[start : start + count]
    repeats = -(-count // piece.numel())
    return piece.repeat(repeats)[:count].reshape(shape)


# --- formats --------------------------------------------------------------------------------


def write_safetensors(kind: str, folder: Path, *, salt: int = 0) -> None:
    """Write a Hugging Face folder: shards, their index, a configuration."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    count = len(_split(kind))
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards(kind, salt), 1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    if count > 1:
        index = {"metadata": {"total_size": size_of(kind)}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def write_torch(kind: str, folder: Path, *, salt: int = 0) -> None:
    folder.mkdir(parents=True)
    for number, tensors in enumerate(shards(kind, salt), 1):
        torch.save(tensors, folder / f"pytorch_model-{number:05d}.bin")


def write_tensorizer(kind: str, folder: Path, *, salt: int = 0) -> None:
    """Write all tensors into one file: it has no shards. Raises what tensorizer raises (it cannot write 10,000)."""
    from tensorizer import TensorSerializer

    folder.mkdir(parents=True)
    (tensors,) = shards(kind, salt)
    serializer = TensorSerializer(str(folder / "model.tensors"))
    serializer.write_state_dict(tensors)
    serializer.close()


WRITERS: dict[str, Callable[..., None]] = {
    "safetensors": write_safetensors,
    "torch": write_torch,
    "tensorizer": write_tensorizer,
}


def write_sllm(source: Path, folder: Path) -> None:
    """Convert a safetensors folder."""
    from sllm.loader import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    convert(source, folder)
