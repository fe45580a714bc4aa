"""The key of a runtime layout: which starts can use parameters that an earlier one saved. Pure.

An engine fuses, pads and shards a checkpoint's tensors when it loads them. What comes of it depends on the checkpoint,
the engine's version, its device and rank, and on a few of the deployment's arguments; anything else that changes it
would serve wrong weights, so agent and engine host both compute the key, and the host also compares every parameter's
name, shape and dtype.

Which models are saved at all is said here too: the agent must know before it makes room for what is to be written, the
engine host once vLLM has made up its mind.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from sllm.core.device import DeviceKind
from sllm.core.replica import ReplicaSpec

# Known to be all in their parameters and persistent buffers: with those an engine needs nothing else of a checkpoint.
# A list, because it cannot be seen from outside: a model's `load_weights` may leave what it read in buffers that are
# not saved, in attributes or in objects of any kind, and a start from parameters alone would answer wrongly, without
# an error. Before a name is added, read its class (and its layers') for that, and compare answers from either layout,
# as tests/engine/test_vllm_runtime.py does. Layers of quantised models do such things as a rule.
SAVED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "OPTForCausalLM",
    "GPT2LMHeadModel",
)

# What every key says; the engine adds whatever else its parameters depend on.
CHECKPOINT = "checkpoint"  # the digest of the one that they were made from
ENGINE = "engine"
ENGINE_VERSION = "engine_version"

# Engine arguments that change which parameters an engine has, or what is in them.
_ARGUMENTS = ("dtype", "hf_overrides", "kv_cache_dtype", "quantization")

_QUANTISED_BY = ("quantization_config", "compression_config")  # keys of a config.json


def runtime_key(
    spec: ReplicaSpec, *, engine: str, version: str, device_kind: DeviceKind | str, world_size: int, rank: int
) -> dict[str, str]:
    """Return the key for one rank of a replica. `engine` and `version` are as in WarmReady."""
    given = {f"arg.{name}": spec.engine_args[name] for name in _ARGUMENTS if name in spec.engine_args}
    return {
        CHECKPOINT: spec.digest,
        ENGINE: engine,
        ENGINE_VERSION: version,
        "device_kind": str(device_kind),
        "world_size": str(world_size),
        "rank": str(rank),
        **given,
    }


def is_saved(architectures: Collection[str], *, quantised: bool) -> bool:
    """Whether an engine saves the parameters of such a model. Loading a quantised one makes more than parameters."""
    return bool(architectures) and not quantised and set(architectures) <= set(SAVED_ARCHITECTURES)


def will_be_saved(config: Mapping[str, Any], engine_args: Mapping[str, str]) -> bool:
    """As `is_saved`, before there is an engine: from a checkpoint's config.json and a deployment's arguments."""
    known = {**config, **_json_object(engine_args.get("hf_overrides", "{}"))}
    architectures = known.get("architectures")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        return False
    quantised = "quantization" in engine_args or any(known.get(name) for name in _QUANTISED_BY)
    return is_saved(architectures, quantised=quantised)


def _json_object(text: str) -> dict[str, Any]:
    """Return an empty one for what is none: the engine will say what is wrong with it."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
