"""What vLLM's exceptions mean. It has few types for them, so their words decide; unknown words mean EngineFailed."""

from __future__ import annotations

from sllm.errors import (
    CapacityExceeded,
    EngineFailed,
    InvalidArgument,
    InvalidCheckpoint,
    SllmError,
    UnsupportedCheckpoint,
)


def config_error(error: Exception) -> SllmError:
    """Return why vLLM does not take a configuration. Trying again would not help."""
    text = _one_line(error)
    if isinstance(error, NotImplementedError) or "rchitecture" in text or "not supported" in text:
        return UnsupportedCheckpoint(f"vLLM cannot serve this model: {text}")
    return InvalidArgument(f"vLLM refused the configuration: {text}")


def build_error(error: Exception) -> SllmError:
    """Return why an engine with an accepted configuration did not come up."""
    if isinstance(error, SllmError):
        return error
    text = _one_line(error)
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return CapacityExceeded(f"the model does not fit in its memory: {text}", hint="give the device more memory")
    if isinstance(error, ValueError) and any(sign in text.lower() for sign in ("kv cache", "memory for the cache")):
        return CapacityExceeded(
            f"the model's context does not fit in its memory: {text}", hint="deploy with a smaller --max-model-len"
        )
    if isinstance(error, KeyError) or "not initialized from checkpoint" in text or "size mismatch" in text:
        return InvalidCheckpoint(f"the checkpoint's tensors do not fit its config.json: {text}")
    return EngineFailed(f"the engine did not start: {text}", hint="see the replica's log: `sllm logs REPLICA`")


def _one_line(error: Exception) -> str:
    """Return the telling part of an error's text: pydantic puts a headline before it and advice after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = next((line for line in lines if line.startswith(("Value error,", "Assertion failed,"))), None)
    text = telling.partition(", ")[2] if telling else " ".join(lines[:2])
    return text.partition(" [type=")[0] or type(error).__name__
