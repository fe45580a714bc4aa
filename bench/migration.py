"""What a client sees of a migration: the pause, against its own token interval, a restart and one cold recompute.

Reproduces the paper's point that moving tokens in rounds is cheap (OSDI'24, §5 and §7.3), on real engines: two nodes, a
stream each time moved from one to the other in the middle. Everything shares this machine's cores, so CPU seconds are
given beside times.

    .venv/bin/python bench/migration.py [--rounds 7] [--model small] [--length 1000] [--quick]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from common import ROOT, Prediction, console, save, summary, table

sys.path.insert(0, str(ROOT / "tests"))
from e2e.cluster import DEMO_MODEL, Cluster, running
from e2e.operator import Operator

PREDICTIONS = [
    Prediction("interval, alone", "3-4 ms (4 M parameters), 15 ms (100 M)"),
    Prediction("pause of a move, small model", "8-12 ms at any length: two to three intervals"),
    Prediction("pause of a move, 100 M", "40-60 ms: three to four intervals"),
    Prediction("restart from the prompt, 1,000 tokens", "3-4 s and 15 s: over 100x the pause"),
    Prediction("one cold recompute, 1,000 tokens", "60 ms and 800 ms: 5-15x the pause"),
    Prediction("bytes moved", "2 bytes a token, sent once in full and then the rest: under 10 kB"),
    Prediction("other streams of both engines", "one stretched step while a round is computed"),
]
MODELS = ("small", "large")
LENGTHS = (100, 500, 1000, 2000)
AFTER = 60  # tokens that are waited for after a move
MAX_MODEL_LEN = 4096
LARGE = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 14, "num_attention_heads": 12}
LARGE |= {"num_key_value_heads": 4, "tie_word_embeddings": False}
OTHERS = 2  # streams that run beside, on each node


def write_large(folder: Path) -> Path:
    """Write a checkpoint of about 100 M random parameters with the demo model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "*.md", "chats.json"))
    config = json.loads((folder / "config.json").read_text()) | LARGE
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes(config):
        values = torch.randn(shape, generator=generator) * 0.05 if len(shape) > 1 else torch.ones(shape)
        tensors[name] = values.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every parameter of a Llama."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "lm_head.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in (("q", (query, hidden)), ("k", (key, hidden)), ("v", (key, hidden)), ("o", (hidden, query))):
            yield f"{prefix}.self_attn.{name}_proj.weight", shape
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            yield f"{prefix}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)


@dataclass(slots=True)
class Timed:
    """A stream as its client sees it: when each token came, and which."""

    request: str = ""
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


Watcher = Callable[[Timed], None]


def stream(
    cluster: Cluster, model: str, prompt: str | list[int], count: int, watch: Watcher = lambda timed: None
) -> Timed:
    """Ask for `count` tokens; `watch` is called after each of them."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    timed = Timed()
    with httpx.stream("POST", f"{cluster.base_url}/completions", json=body, timeout=300) as response:
        response.raise_for_status()
        timed.request = response.headers["x-request-id"]
        for line in response.iter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise SystemExit(f"the stream failed: {event['error']}")
                for choice in event["choices"]:
                    timed.times += [now] * len(choice["token_ids"])
                    timed.tokens += choice["token_ids"]
                watch(timed)
    return timed


@dataclass(slots=True, kw_only=True)
class Move:
    """One move: seconds. `pause_s` is the longest gap from the command on, `usual_s` that of as many tokens before it;
    `cpu_s` is of both engines meanwhile."""

    pause_s: float
    usual_s: float
    interval_s: float
    command_s: float
    cpu_s: float
    rounds: int
    sent_bytes: int


class Mover:
    """Moves the stream that it watches, once, when it has `at` tokens."""

    def __init__(self, operator: Operator, model: str, at: int) -> None:
        self._operator, self._model, self._at = operator, model, at
        self._thread: threading.Thread | None = None
        self.began = self.ended = self.cpu_s = 0.0
        self.rounds = self.sent_bytes = 0

    def __call__(self, timed: Timed) -> None:
        if self._thread is None and len(timed.tokens) >= self._at:
            self._thread = threading.Thread(target=self._move, args=(timed.request,))
            self._thread.start()

    def _move(self, request: str) -> None:
        source = self._operator.node_of(request)
        target = next(node for node in self._operator.nodes() if node != source)
        before = cpu_s(self._operator, self._model)
        self.began = time.perf_counter()
        done = self._operator.migrate(request, target)
        self.ended = time.perf_counter()
        self.cpu_s = cpu_s(self._operator, self._model) - before
        assert done.state == "done", done
        # Where the gateway's report of where it is came first, the operation was over before what it took was told.
        if told := re.search(r"(\d+) rounds?, ([\d,]+) bytes", done.phase):
            self.rounds, self.sent_bytes = int(told[1]), int(told[2].replace(",", ""))

    def join(self) -> None:
        assert self._thread is not None, "the stream ended before it could be moved"
        self._thread.join()


def cpu_s(operator: Operator, model: str) -> float:
    times = [psutil.Process(row.status.pid).cpu_times() for row in operator.ready(model)]
    return sum(each.user + each.system for each in times)


def moved(cluster: Cluster, operator: Operator, model: str, length: int, prompt: str) -> Move:
    mover = Mover(operator, model, length)
    # A command takes milliseconds to arrive: the stream must not be over by then.
    timed = stream(cluster, model, prompt, length + AFTER + 200, mover)
    mover.join()
    gaps = list(zip(timed.times[1:], timed.gaps, strict=True))
    before = [gap for at, gap in gaps if at < mover.began]
    during = [gap for at, gap in gaps if at >= mover.began]
    window = int((mover.ended - mover.began) / statistics.median(before)) + AFTER
    return Move(
        pause_s=max(during[:window]),
        usual_s=max(before[-window:]),
        interval_s=statistics.median(before[-50:]),
        command_s=mover.ended - mover.began,
        cpu_s=mover.cpu_s,
        rounds=mover.rounds,
        sent_bytes=mover.sent_bytes,
    )


def cold_recompute_s(cluster: Cluster, model: str, tokens: list[int], salt: int) -> float:
    """Return the time to the first token of a request with so many tokens that no cache knows."""
    began = time.perf_counter()
    timed = stream(cluster, model, [3 + salt % 2000, *tokens], 1)
    return timed.times[0] - began


@contextmanager
def company(cluster: Cluster, model: str, streams: int) -> Iterator[list[Timed]]:
    """Let other streams run beside, until the end of the block."""
    over = threading.Event()
    found: list[Timed] = []

    def run(number: int) -> None:
        while not over.is_set():
            timed = Timed()
            found.append(timed)

            def watch(so_far: Timed, kept: Timed = timed) -> None:
                kept.times = so_far.times
                if over.is_set():
                    raise StopIteration

            try:
                stream(cluster, model, f"Number {number} is", 2000, watch)
            except StopIteration:
                return

    threads = [threading.Thread(target=run, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        over.set()
        for thread in threads:
            thread.join()


def measure(cluster: Cluster, operator: Operator, model: str, lengths: tuple[int, ...], rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for length in lengths:
        moves, cold, restart = [], [], []
        for number in range(rounds):
            prompt = f"Python is {number} times {length}"
            moves.append(moved(cluster, operator, model, length, prompt))
            whole = stream(cluster, model, prompt, length + 1)
            restart.append(whole.times[-1] - whole.times[0])
            cold.append(cold_recompute_s(cluster, model, whole.tokens, number))
        results[str(length)] = figures(moves) | {
            "restart_s": summary(restart) | {"all": restart},
            "cold_recompute_s": summary(cold) | {"all": cold},
        }
        show(model, length, results[str(length)])
    with company(cluster, model, 2 * OTHERS) as others:
        time.sleep(2.0)  # until they decode
        quiet_until = time.perf_counter()
        beside = [moved(cluster, operator, model, 500, f"Beside {number} others") for number in range(rounds)]
        gaps = [(at, gap) for timed in list(others) for at, gap in zip(timed.times[1:], timed.gaps, strict=False)]
    before = [gap for at, gap in gaps if at < quiet_until]
    during = [gap for at, gap in gaps if at >= quiet_until]
    results["500, beside others"] = figures(beside) | {
        "others_interval_before_s": quantiles(before),
        "others_interval_during_s": quantiles(during),
    }
    return results


def figures(moves: list[Move]) -> dict[str, Any]:
    pauses = [move.pause_s for move in moves]
    told = [move for move in moves if move.rounds] or moves
    return {
        "pause_s": quantiles(pauses) | {"all": pauses},
        "usual_longest_gap_s": quantiles([move.usual_s for move in moves]),
        "interval_s": summary([move.interval_s for move in moves]),
        "pause_in_intervals": quantiles([move.pause_s / move.interval_s for move in moves]),
        "command_s": summary([move.command_s for move in moves]),
        "engines_cpu_s": summary([move.cpu_s for move in moves]),
        "rounds": summary([move.rounds for move in told]),
        "sent_bytes": summary([move.sent_bytes for move in told]),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
        "max": ordered[-1],
        "n": len(ordered),
    }


def show(model: str, length: int, result: dict[str, Any]) -> None:
    pause = result["pause_s"]["p50"]
    restart, cold = result["restart_s"]["median"], result["cold_recompute_s"]["median"]
    console.print(
        f"{model}, {length} tokens: pause {1e3 * pause:.1f} ms ({result['pause_in_intervals']['p50']:.1f} intervals), "
        f"restart {restart:.2f} s ({restart / pause:.0f}x), cold recompute {1e3 * cold:.0f} ms ({cold / pause:.1f}x)"
    )


def report(results: dict[str, dict[str, Any]]) -> None:
    rows = [row_of(model, length, r) for model, by_length in results.items() for length, r in by_length.items()]
    columns = ["model", "tokens", "interval ms", "pause p50 ms", "p95", "max", "intervals", "usual ms", "restart /"]
    columns += ["cold /", "bytes", "CPU s"]
    table("pause of a migration, as the client sees it; beside the longest gap that is usual", columns, rows)


def row_of(model: str, length: str, result: dict[str, Any]) -> list[Any]:
    pause = result["pause_s"]
    return [
        model,
        length,
        1e3 * result["interval_s"]["median"],
        *(1e3 * pause[quantile] for quantile in ("p50", "p95", "max")),
        result["pause_in_intervals"]["p50"],
        1e3 * result["usual_longest_gap_s"]["p50"],
        *(
            result[peer]["median"] / pause["p50"] if peer in result else ""
            for peer in ("restart_s", "cold_recompute_s")
        ),
        round(result["sent_bytes"]["median"]),
        result["engines_cpu_s"]["median"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated; default: both")
    parser.add_argument("--length", type=int, action="append", help="may be repeated; default: all of them")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two lengths, two rounds, no results kept")
    given = parser.parse_args()
    lengths, rounds = (LENGTHS[:2], 2) if given.quick else (tuple(given.length or LENGTHS), given.rounds)
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "cluster").mkdir()
        cluster = stack.enter_context(running(folder / "cluster", engine="vllm", nodes=2))
        operator = stack.enter_context(Operator(cluster))
        for model in given.model or MODELS:
            source = DEMO_MODEL if model == "small" else write_large(folder / "large")
            cluster.cli("checkpoint", "add", model, str(source), "--all")
            arguments = ["--engine-arg", "dtype=float32", "--max-model-len", str(MAX_MODEL_LEN), "--min", "2"]
            cluster.cli("deploy", model, "--checkpoint", model, *arguments, "--max", "2", timeout_s=300)
            stream(cluster, model, "Python is", 20)  # the front end is made at first use
            results[model] = measure(cluster, operator, model, lengths, rounds)
            cluster.cli("delete", model)
            if not given.quick:
                save(f"migration-{model}", PREDICTIONS, {"results": results[model]})
    report(results)


if __name__ == "__main__":
    main()
