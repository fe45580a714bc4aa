"""vLLM engines for benches: as an engine host builds them, but loading by themselves, each in a fork."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CALL, _END = b"c", b"e"


class Fork:
    """A fork of this process, which must be single-threaded. It makes something to call, and calls it when called: so
    several can take turns."""

    def __init__(self, make: Callable[[], Callable[[], Any]]) -> None:
        turns, self._turns = os.pipe()
        results, results_in = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._turns)
            try:
                _take_turns(make(), turns, results_in)
            finally:
                os._exit(0)
        os.close(turns)
        os.close(results_in)
        self._results = os.fdopen(results, "rb")

    def __call__(self) -> Any:
        """Return what a call there returns (JSON has to carry it). Raises RuntimeError if it ends without a result."""
        self._tell(_CALL)
        line = self._results.readline()
        if not line:
            raise RuntimeError("the engine's process ended without a result")
        return json.loads(line)

    def close(self) -> None:
        self._tell(_END)  # closing its end would not do: other forks have it, too
        os.close(self._turns)
        self._results.close()
        os.waitpid(self._pid, 0)

    def _tell(self, what: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            os.write(self._turns, what)


def _take_turns(call: Callable[[], Any], turns: int, results: int) -> None:
    while os.read(turns, 1) == _CALL:
        line = json.dumps(call()).encode() + b"\n"
        while line:
            line = line[os.write(results, line) :]


def in_fork(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, done in a fork."""
    fork = Fork(lambda: work)
    try:
        return fork()
    finally:
        fork.close()


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
