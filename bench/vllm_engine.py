"""vLLM engines for benches: as an engine host builds them, but loading by themselves, each in a fork."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def in_fork(work: Callable[[], T]) -> T:
    """Return what `work` returns (JSON has to carry it), done in a fork of this process, which must be single-threaded.

    Raises RuntimeError if it ends without a result.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as results:
        text = results.read()
    os.waitpid(pid, 0)
    if not text:
        raise RuntimeError("the engine's process ended without a result")
    result: T = json.loads(text)
    return result


def write_config(folder: Path, config: dict[str, Any]) -> str:
    """Make a folder that is a model of random weights (`load_format="dummy"`); return its path."""
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def make_engine(model: str, **changes: Any) -> Any:
    """Return vLLM's own LLMEngine, of one thread, in this process."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import dummy_loader
    from vllm.v1.engine.llm_engine import LLMEngine

    torch.set_num_threads(1)
    dummy_loader.initialize_single_dummy_weight = _initialize  # vLLM's own are so small that the activations underflow
    values: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "distributed_executor_backend": "uni",
        "disable_log_stats": True,
        **changes,
    }
    return LLMEngine.from_engine_args(EngineArgs(**values))


def _initialize(weight: Any) -> None:
    weight.data.fill_(1.0) if weight.dim() == 1 else weight.data.normal_(0.0, 0.05)
