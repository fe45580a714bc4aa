"""How large should a block of the KV cache be on a CPU? Decode and prefill speed, and what a handover computes again.

Decides docs/decisions/0012-block-size.md: who resumes a request finds full blocks in its prefix cache and computes the
partly filled one again, up to 127 tokens of vLLM's 128. The demo model in its own bfloat16 and a Llama of about 100
million parameters in float32. The engines of a model are forks that take turns, so that a disturbance meets all; what
decides is the ratio to the one with 128 in the same round.

    .venv/bin/python bench/block_size.py [--rounds 20]     (half of them with the large model)
    .venv/bin/python bench/block_size.py --only decode --rounds 80     (more rounds of less: block-size-decode.json)
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import Prediction, console, save, summary, table
from onednn import CONFIG
from vllm_engine import Fork, make_engine, write_config

from sllm.engine.warm import warm_up

PREDICTIONS = [
    Prediction("decode", "attention is a small part of a step at 512 tokens: 32 within 3 % of 128"),
    Prediction("prefill", "within 3 % of each other"),
    Prediction("handover", "half a block plus the gap: 72 tokens at 128, 24 at 32; a third of the time"),
    Prediction("16 tokens", "refused, or slower: the attention kernels want multiples of 32"),
]
CONTEXT = 512
NEW_TOKENS = 32
GAP = 8
TAILS = (0, 25, 51, 76, 102)  # tokens beyond a multiple of 128 that the handed over request has
SIZES = (128, 64, 32, 16)
DEMO = str(Path(__file__).resolve().parent.parent / "examples" / "demo-model")


def engine_with(block_size: int, measures: Sequence[str], changes: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """Return what measures an engine, in CPU seconds of its one thread."""
    run = Runs(make_engine(**changes, block_size=block_size, max_num_seqs=16, max_model_len=1024))
    run.prompts([run.next_prompt(CONTEXT)], new=4)  # the first steps allocate
    return lambda: {name: MEASURES[name](run) for name in measures}


def _decode(run: Runs, streams: int) -> float:
    """Return tokens per second behind a context that is cached, from the median step."""
    first = run.next_prompt(CONTEXT)
    run.prompts([first], new=1)
    steps = run.prompts([[*first, stream] for stream in range(streams)], new=1 + NEW_TOKENS)
    return streams / statistics.median(steps[-NEW_TOKENS:])


def _prefill(run: Runs) -> float:
    return CONTEXT / sum(run.prompts([run.next_prompt(CONTEXT)], new=1))


def _handover_ms(run: Runs) -> float:
    return 1e3 * statistics.fmean(_first_token_s(run, tail) for tail in TAILS)


def _first_token_s(run: Runs, tail: int) -> float:
    """Return what the first token takes at a destination that has recomputed all but the gap."""
    tokens = run.next_prompt(3 * 128 + tail + GAP)
    run.prompts([tokens[:-GAP]], new=1)
    return sum(run.prompts([tokens], new=1))


MEASURES: dict[str, Callable[[Runs], float]] = {
    "decode x1, tok/s": lambda run: _decode(run, 1),
    "decode x16, tok/s": lambda run: _decode(run, 16),
    "prefill, tok/s": _prefill,
    "handover, ms": _handover_ms,
}
Round = dict[str, float]


class Runs:
    """Requests of an engine, each prompt a new one."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._made = 0

    def next_prompt(self, length: int) -> list[int]:
        self._made += 1
        return [3 + (self._made * 131 + position * 17) % 2000 for position in range(length)]

    def prompts(self, prompts: list[list[int]], *, new: int) -> list[float]:
        """Run these until each has had `new` tokens; return the seconds of each step."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        for name, prompt in enumerate(prompts):
            self._engine.add_request(f"{name}", {"prompt_token_ids": prompt}, params)
        steps = []
        while self._engine.has_unfinished_requests():
            started = time.process_time()
            self._engine.step()
            steps.append(time.process_time() - started)
        return steps


def compared(changes: dict[str, Any], measures: Sequence[str], rounds: int) -> dict[int, list[Round]]:
    """Return the figures of each round for each size that is not refused."""
    engines = {size: Fork(functools.partial(engine_with, size, measures, changes)) for size in SIZES}
    figures: dict[int, list[Round]] = {size: [] for size in SIZES}
    for turn in range(rounds):
        for size in (*SIZES[turn % len(SIZES) :], *SIZES[: turn % len(SIZES)]):  # who goes first changes, too
            if size not in engines:
                continue
            try:
                figures[size].append(engines[size]())
            except RuntimeError:
                engines.pop(size).close()
    for engine in engines.values():
        engine.close()
    return {size: runs for size, runs in figures.items() if runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", choices=["decode", "prefill", "handover"])
    options = parser.parse_args()
    measures = [name for name in MEASURES if name.startswith(options.only)]
    warm_up("vllm")
    with tempfile.TemporaryDirectory() as temporary:
        large = {"model": write_config(Path(temporary), CONFIG), "dtype": "float32", "load_format": "dummy"}
        gc.freeze()
        figures = {
            "demo": compared({"model": DEMO, "dtype": "bfloat16"}, measures, options.rounds),
            "100M": compared(large, measures, max(3, options.rounds // 2)),
        }
    _report(figures, measures, "block-size" + (f"-{options.only}" if options.only else ""))


def _report(figures: dict[str, dict[int, list[Round]]], measures: Sequence[str], name: str) -> None:
    results, rows = {}, []
    for model, by_size in figures.items():
        for size, runs in by_size.items():
            values = {what: [run[what] for run in runs] for what in measures}
            ratios = {
                what: [run[what] / first[what] for run, first in zip(runs, by_size[SIZES[0]], strict=True)]
                for what in measures
            }
            results[f"{model}, blocks of {size}"] = {
                "figures": {what: summary(values[what]) for what in measures},
                f"ratio_to_{SIZES[0]}": {what: summary(ratios[what]) for what in measures},
            }
            cells = [f"{statistics.median(values[m]):.3g} ({statistics.median(ratios[m]):.2f})" for m in measures]
            rows.append((model, size, *cells))
    table(f"Tokens in a block of the KV cache (ratio to {SIZES[0]})", ("model", "block", *measures), rows)
    refused = [size for size in SIZES if size not in figures["demo"]]
    save(name, PREDICTIONS, {"refused": refused, "results": results})
    console.print(f"per CPU second of one thread; decode behind {CONTEXT} tokens; handover: {GAP} tokens and a tail")


if __name__ == "__main__":
    main()
