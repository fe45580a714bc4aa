"""What does a seed of its own cost a sampled request? Decode throughput with and without, on the real engine.

Decides docs/decisions/0013-drawn-seeds.md: with a seed, a request that asks for none can be resumed exactly after the
death of its engine; if it costs nothing, the gateway draws one. The demo model (4 million parameters, so that sampling
is as large a part of a step as it gets) and a Llama of about 100 million, both in float32, each engine in a fork; the
sides take turns in the same engine. The sampler, which is where a seed costs, is timed by itself, too: its
share resolves what whole runs on a noisy machine do not.

    .venv/bin/python bench/seeds.py [--rounds 30]     (a sixth of them with the large model)
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Prediction, console, save, summary, table
from onednn import CONFIG
from vllm_engine import in_fork, make_engine, write_config

from sllm.engine.warm import warm_up

PREDICTIONS = [
    Prediction("1 stream", "one draw and one item() per step, 5 us of 4 ms (demo) or 60 ms (100 M): below 0.5 %"),
    Prediction("16 streams", "16 draws per step, 80 us of 10 ms: below 1 %"),
    Prediction("64 streams", "64 draws per step, 0.3 ms of 25 ms: 1-2 % on the demo model, nothing on the other"),
]
NEW_TOKENS = {1: 64, 16: 32, 64: 16}  # for each number of streams
PROMPT_TOKENS = 16
LIMIT = 0.02


class SamplerClock:
    """Notes what each call of the sampler takes, in CPU time of its thread. To be made before the engine."""

    def __init__(self) -> None:
        from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

        self._calls: list[float] = []
        sample: Any = TopKTopPSampler.forward_cpu

        def timed(*args: Any) -> Any:
            started = time.thread_time()
            result = sample(*args)
            self._calls.append(time.thread_time() - started)
            return result

        TopKTopPSampler.forward_cpu = timed  # type: ignore[method-assign]

    def take(self) -> float:
        """Return the median of the calls since the last time."""
        median = statistics.median(self._calls)
        self._calls.clear()
        return median


def measured(model: str, load_format: str, rounds: int) -> dict[str, Any]:
    """Return, for each number of streams and each side, CPU seconds per token of each round: of all, of the sampler."""
    clock = SamplerClock()
    engine = make_engine(
        model, load_format=load_format, dtype="float32", max_num_seqs=max(NEW_TOKENS), max_model_len=128
    )
    figures: dict[str, Any] = {}
    for streams in NEW_TOKENS:
        _s_per_token(engine, streams, seeded=True)  # the first steps allocate
        clock.take()
        sides: dict[str, list[tuple[float, float]]] = {"unseeded": [], "seeded": []}
        for turn in range(rounds):
            # Which side goes first alternates, so that a drift of the machine meets both.
            for seeded in (False, True) if turn % 2 else (True, False):
                whole = _s_per_token(engine, streams, seeded=seeded)
                sides["seeded" if seeded else "unseeded"].append((whole, clock.take() / streams))
        figures[str(streams)] = sides
    return figures


def _s_per_token(engine: Any, streams: int, *, seeded: bool) -> float:
    from vllm import SamplingParams

    for stream in range(streams):
        params = SamplingParams(
            temperature=1.0, seed=stream + 1 if seeded else None, max_tokens=NEW_TOKENS[streams], ignore_eos=True
        )
        params.detokenize = False
        tokens = [3 + (stream * 131 + position * 17) % 2000 for position in range(PROMPT_TOKENS)]
        engine.add_request(f"{stream}", {"prompt_token_ids": tokens}, params)
    started = time.process_time()
    while engine.has_unfinished_requests():
        engine.step()
    return (time.process_time() - started) / (streams * NEW_TOKENS[streams])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    warm_up("vllm")
    demo = str(Path(__file__).resolve().parent.parent / "examples" / "demo-model")
    with tempfile.TemporaryDirectory() as folder:
        large = write_config(Path(folder), CONFIG)
        gc.freeze()
        figures = {
            "demo model": in_fork(lambda: measured(demo, "auto", rounds)),
            "100 M parameters": in_fork(lambda: measured(large, "dummy", max(3, rounds // 6))),
        }
    _report(figures)


def _report(figures: dict[str, dict[str, dict[str, list[tuple[float, float]]]]]) -> None:
    rows, results = [], {}
    for model, by_streams in figures.items():
        for streams, sides in by_streams.items():
            whole = {side: [1e3 * run for run, _ in runs] for side, runs in sides.items()}
            sampler = {side: [1e6 * share for _, share in runs] for side, runs in sides.items()}
            # Paired: what a round's seeded turn takes more than the unseeded one beside it.
            costs = [100 * (s / u - 1) for s, u in zip(whole["seeded"], whole["unseeded"], strict=True)]
            more_us = statistics.median(sampler["seeded"]) - statistics.median(sampler["unseeded"])
            share = 0.1 * more_us / statistics.median(whole["unseeded"])
            results[f"{model}, {streams} streams"] = {
                **{f"{side}_ms_per_token": summary(values) for side, values in whole.items()},
                **{f"{side}_sampler_us_per_token": summary(values) for side, values in sampler.items()},
                "whole_runs_cost_percent": summary(costs),
                "sampler_cost_percent": share,
            }
            rows.append(
                (model, streams, statistics.median(whole["unseeded"]), statistics.median(costs), more_us, share)
            )
    columns = ("model", "streams", "ms/token", "whole runs: cost, %", "sampler: more us/token", "sampler: cost, %")
    table(f"A seed for each request, temperature 1; the limit is {LIMIT:.0%}", columns, rows)
    save("seeds", PREDICTIONS, {"figures": results})
    console.print(
        "one thread, CPU time; whole runs: median over pairs of seeded / unseeded - 1, as noisy as the machine"
    )


if __name__ == "__main__":
    main()
