"""Engine arguments: which of vLLM's options a deployment may set, and who takes each.

An allow-list, because the rest is either ours to decide (model, lengths, batch size, parallelism, addresses) or would
let whoever may deploy run code of their own (plugins, templates by path, remote code, middleware).
"""

from __future__ import annotations

import difflib
from enum import Flag, auto

from sllm.errors import InvalidArgument


class Taker(Flag):
    ENGINE = auto()
    FRONT_END = auto()
    BOTH = ENGINE | FRONT_END


ENGINE_ARGS: dict[str, Taker] = {
    "block_size": Taker.ENGINE,
    "dtype": Taker.BOTH,
    "enable_auto_tool_choice": Taker.FRONT_END,
    "enable_chunked_prefill": Taker.ENGINE,
    "enable_prefix_caching": Taker.ENGINE,
    "enforce_eager": Taker.ENGINE,
    "generation_config": Taker.FRONT_END,
    "gpu_memory_utilization": Taker.ENGINE,
    "hf_overrides": Taker.BOTH,
    "kv_cache_dtype": Taker.ENGINE,
    "kv_cache_memory_bytes": Taker.ENGINE,
    "max_logprobs": Taker.BOTH,
    "max_num_batched_tokens": Taker.ENGINE,
    "quantization": Taker.BOTH,
    "reasoning_parser": Taker.BOTH,
    "return_tokens_as_token_ids": Taker.FRONT_END,
    "seed": Taker.ENGINE,
    "tool_call_parser": Taker.FRONT_END,
}


def normalized(name: str) -> str:
    """Return `max-logprobs` as `max_logprobs`: both spellings are accepted."""
    return name.strip().lstrip("-").replace("-", "_")


def check_engine_args(args: dict[str, str]) -> None:
    """Raise InvalidArgument for the first name that a deployment may not set."""
    for name in args:
        if name not in ENGINE_ARGS:
            near = difflib.get_close_matches(normalized(name), ENGINE_ARGS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ENGINE_ARGS)}"
            raise InvalidArgument(f"unknown engine argument {name!r}", hint=hint)


def flags_for(args: dict[str, str], taker: Taker) -> list[str]:
    """Return command-line flags for the arguments that `taker` takes; `true` and `false` make `--x` and `--no-x`."""
    flags: list[str] = []
    for name, value in sorted(args.items()):
        if not ENGINE_ARGS[name] & taker:
            continue
        dashed = name.replace("_", "-")
        if value.lower() in ("true", "false"):
            flags.append(f"--{dashed}" if value.lower() == "true" else f"--no-{dashed}")
        else:
            # One word, so that a value that begins with a dash is never taken for a flag.
            flags.append(f"--{dashed}={value}")
    return flags
