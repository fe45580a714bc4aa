"""The key of a runtime layout: which starts can use parameters that an earlier one saved. Pure.

An engine fuses, pads and shards a checkpoint's tensors when it loads them. What comes of it depends on the checkpoint,
the engine's version, its device and rank, and on a few of the deployment's arguments; anything else that changes it
would serve wrong weights, so agent and engine host both compute the key, and the host also compares every parameter's
name, shape and dtype.
"""

from __future__ import annotations

from sllm.core.device import DeviceKind
from sllm.core.replica import ReplicaSpec

# What every key says; the engine adds whatever else its parameters depend on.
CHECKPOINT = "checkpoint"  # the digest of the one that they were made from
ENGINE = "engine"
ENGINE_VERSION = "engine_version"

# Engine arguments that change which parameters an engine has, or what is in them.
_ARGUMENTS = ("dtype", "hf_overrides", "kv_cache_dtype", "quantization")


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
