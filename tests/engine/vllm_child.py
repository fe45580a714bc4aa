"""vLLM's engine, our VllmCore around it, in a process of its own: plays scripts of requests, step by step.

    python -c "from engine.vllm_child import main; main()" FD MODEL JSON

MODEL is a folder as Hugging Face has them, JSON what is changed of vLLM's arguments. It answers each `Play` that comes
by FD with the outputs by key, or with the error of what it refused.
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from sllm.core.tokens import TokenRequest
from sllm.engine.base import Hooks, Output
from sllm.errors import SllmError

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 2048,
    "enable_chunked_prefill": False,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """Requests by key, and recomputes (tokens, salt) by key. Those in `late` are added after that many steps, those in
    `leave` are aborted once they have had that many tokens."""

    requests: dict[int, TokenRequest] = field(default_factory=dict)
    recomputes: dict[int, tuple[list[int], str]] = field(default_factory=dict)
    late: dict[int, int] = field(default_factory=dict)
    leave: dict[int, int] = field(default_factory=dict)


class Engine:
    """A VllmCore with the arguments of an engine host, but for the changes; it loads the model by itself."""

    def __init__(self, model: str, changes: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core import EngineCore

        from sllm.engine import vllm_engine, vllm_resume

        config = EngineArgs(model=model, **{**ARGUMENTS, **changes}).create_engine_config()
        vllm_resume.install(config.model_config.get_vocab_size())
        self._woken = threading.Semaphore(0)
        nothing: Any = lambda *_: None  # noqa: E731
        hooks = Hooks(wake=self._woken.release, progress=nothing, arrived=nothing, saved=nothing)
        self.core = vllm_engine.VllmCore(EngineCore(config, vllm_engine._Executor, log_stats=False), hooks)

    def play(self, script: Play) -> dict[int, list[Output]]:
        """Run a script until nothing is left to do."""
        outputs: dict[int, list[Output]] = {key: [] for key in (*script.requests, *script.recomputes)}
        open_keys, step, last_add = set(outputs), 0, max(script.late.values(), default=0)
        while open_keys:
            self._add([key for key in outputs if script.late.get(key, 0) == step], script)
            if not self.core.has_work and step >= last_add:
                self._woken.acquire()  # a grammar is being prepared
            for output in self.core.step() if self.core.has_work else []:
                assert output.key in open_keys, "an output came after the end"
                outputs[output.key].append(output)
                had = sum(len(one.token_ids) for one in outputs[output.key])
                if output.finish is None and had == script.leave.get(output.key):
                    self.core.abort([output.key])
                    open_keys.discard(output.key)
                elif output.finish is not None:
                    open_keys.discard(output.key)
            step += 1
        return outputs

    def _add(self, keys: list[int], script: Play) -> None:
        for key in keys:
            if key in script.requests:
                self.core.add(key, script.requests[key])
            else:
                self.core.recompute(key, *script.recomputes[key])


def main() -> None:
    from sllm.engine.warm import warm_up

    fd, model, changes = sys.argv[1:]
    warm_up("vllm")
    engine = Engine(model, json.loads(changes))
    with Connection(int(fd)) as connection:
        connection.send(engine.core.block_size)
        while True:
            try:
                script = connection.recv()
            except EOFError:
                return
            try:
                connection.send(engine.play(script))
            except SllmError as error:
                connection.send(error)
