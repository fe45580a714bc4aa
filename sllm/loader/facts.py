"""What a checkpoint's config.json and shard index say. Pure; the input is distrusted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sllm.errors import InvalidCheckpoint
from sllm.loader.format import MAX_ARCHITECTURE_CHARACTERS, ModelFacts, is_architecture
from sllm.loader.safetensors import StoredTensor
from sllm.loader.untrusted import json_object

CONFIG = "config.json"
DEFAULT_MAX_MODEL_LEN = 2048
# Families of models have different words for the same thing.
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
)


def model_facts(config: bytes) -> ModelFacts:
    """Read config.json. Raises InvalidCheckpoint."""
    values = json_object(config, CONFIG, unique=False)
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise InvalidCheckpoint(f"{CONFIG} names no architecture", hint="is this a Hugging Face model folder?")
    if not is_architecture(architectures[0]):
        raise InvalidCheckpoint(
            f"{CONFIG} names the architecture {architectures[0][:40]!r}, which no model has",
            hint=f"it is a printable text of at most {MAX_ARCHITECTURE_CHARACTERS} characters",
        )
    return ModelFacts(architecture=architectures[0], max_model_len=_max_model_len(values))


def _max_model_len(values: dict[str, Any]) -> int:
    text = values.get("text_config")
    for source in (values, text if isinstance(text, dict) else {}):
        for key in _LENGTH_KEYS:
            length = source.get(key)
            if type(length) is int and 0 < length < 1 << 31:
                return length
    return DEFAULT_MAX_MODEL_LEN


def shards_in_index(index: bytes, name: str) -> dict[str, str]:
    """Return tensor -> shard from `model.safetensors.index.json`. Raises InvalidCheckpoint."""
    weight_map = json_object(index, name, unique=False).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{name} has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
            raise InvalidCheckpoint(f"{name}: tensor {tensor!r} is said to be in {shard!r}, which is no shard's name")
    return weight_map


def check_shards_present(weight_map: Mapping[str, str], present: Collection[str]) -> None:
    """Raise InvalidCheckpoint for the first shard of the index that is not there."""
    for shard in sorted(set(weight_map.values())):
        if shard not in present:
            raise InvalidCheckpoint(f"shard {shard} is named in the index but is not there", hint="copy it again")


def check_tensors_present(weight_map: Mapping[str, str], tensors: Collection[StoredTensor]) -> None:
    """Raise InvalidCheckpoint for a tensor that two shards hold, or that is not in the shard the index says."""
    found: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise InvalidCheckpoint(f"tensor {tensor.name!r} is in {found[tensor.name]} and in {tensor.shard}")
        found[tensor.name] = tensor.shard
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            raise InvalidCheckpoint(f"the index says that {shard} holds tensor {name!r}, but it does not")
