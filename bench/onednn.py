"""Does oneDNN's repacking of the weights pay on a CPU? Start time, memory, prefill and decode speed, with and without.

Decides docs/decisions/0008-onednn-and-zero-copy.md: with repacking every engine owns a copy of its weights; without,
it can use the node's shared memory as it is. A Llama of about 100 million random parameters, each engine in a fork.

    .venv/bin/python bench/onednn.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from common import Prediction, console, save, summary, table

from sllm.engine.warm import warm_up

PREDICTIONS = [
    Prediction("start", "80-100 ms less without repacking (100 M parameters, bfloat16), and half the private memory"),
    Prediction("decode, 1 stream", "bound by memory bandwidth: within 10 % of each other"),
    Prediction("decode, 16 streams", "oneDNN faster, most in bfloat16 on a machine without AVX-512"),
]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 2112,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DTYPES = ("bfloat16", "float32")
NEW_TOKENS = 32
PREFILL_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    dtype: str
    onednn: bool


def measured(case: Case, model: Path) -> dict[str, float]:
    """Build and time an engine in a fork of this process; return its figures."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(_measure(case, model)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as results:
        text = results.read()
    os.waitpid(pid, 0)
    figures: dict[str, float] = json.loads(text)
    return figures


def _measure(case: Case, model: Path) -> dict[str, float]:
    import torch
    from vllm import _custom_ops
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader, dummy_loader
    from vllm.v1.engine.llm_engine import LLMEngine

    torch.set_num_threads(1)
    _custom_ops._supports_onednn = case.onednn
    processing_s = _timed(base_loader, "process_weights_after_loading")
    dummy_loader.initialize_single_dummy_weight = _initialize  # vLLM's own are so small that the activations underflow
    args = EngineArgs(
        model=str(model),
        load_format="dummy",
        dtype=case.dtype,  # type: ignore[arg-type]  # a literal there
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=True,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    engine = LLMEngine.from_engine_args(args)
    _tokens_per_s(engine, streams=1, prompt=16, new=4)  # the first steps allocate
    return {
        "process_weights_ms": 1e3 * processing_s[0],
        "private_mib": psutil.Process().memory_full_info().uss / 2**20,
        "decode_1": _tokens_per_s(engine, streams=1, prompt=16, new=NEW_TOKENS),
        "decode_16": _tokens_per_s(engine, streams=16, prompt=16, new=NEW_TOKENS),
        "prefill": PREFILL_TOKENS * _tokens_per_s(engine, streams=1, prompt=PREFILL_TOKENS, new=1),
    }


def _initialize(weight: Any) -> None:
    weight.data.fill_(1.0) if weight.dim() == 1 else weight.data.normal_(0.0, 0.05)


def _timed(module: Any, name: str) -> list[float]:
    """Make `module.name` note how long each call takes, in CPU seconds."""
    function, seconds = getattr(module, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = function(*args, **kwargs)
        seconds.append(time.process_time() - started)
        return result

    setattr(module, name, timed)
    return seconds


def _tokens_per_s(engine: Any, *, streams: int, prompt: int, new: int) -> float:
    """Return new tokens per CPU second: of one thread, which does not see what else the machine does."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for stream in range(streams):
        tokens = [3 + (stream * 131 + position * 17) % 2000 for position in range(prompt)]
        engine.add_request(f"{stream}", {"prompt_token_ids": tokens}, params)
    started = time.process_time()
    while engine.has_unfinished_requests():
        engine.step()
    return streams * new / (time.process_time() - started)


def cases() -> Iterator[Case]:
    """Sides alternate, so that a disturbance meets both."""
    for dtype, onednn in product(DTYPES, (True, False)):
        yield Case(dtype=dtype, onednn=onednn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    warm_up("vllm")
    figures: dict[Case, list[dict[str, float]]] = {case: [] for case in cases()}
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(CONFIG))
        gc.freeze()
        for _ in range(rounds):
            for case, runs in figures.items():
                runs.append(measured(case, Path(model)))
    _report(figures)


def _report(figures: dict[Case, list[dict[str, float]]]) -> None:
    results, rows = {}, []
    for case, runs in figures.items():
        side = "oneDNN" if case.onednn else "torch"
        medians = {name: summary([run[name] for run in runs]) for name in runs[0]}
        results[f"{case.dtype}, {side}"] = medians
        rows.append((case.dtype, side, *(medians[name]["median"] for name in medians)))
    columns = ("dtype", "side", "process ms", "private MiB", "decode x1 tok/s", "decode x16 tok/s", "prefill tok/s")
    table("oneDNN repacking, on and off", columns, rows)
    save("onednn", PREDICTIONS, {"figures": results})
    console.print(
        "one thread, per CPU second; decode: 32 new tokens for each stream; prefill: one prompt of 512 tokens"
    )


if __name__ == "__main__":
    main()
