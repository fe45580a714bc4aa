"""Streaming through gateway and engine host against vLLM's own server with the same engine settings.

Throughput, time per output token and CPU per token at concurrency 1, 16 and 64. Both servers are up all the time, only
one is loaded at a time, and they alternate; ratios are of pairs in one round.

    .venv/bin/python bench/gateway.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, Prediction, console, save, summary, table
from peer import vllm_server, wait_until_up

sys.path.insert(0, str(ROOT / "tests"))
from e2e.cluster import DEMO_MODEL, Cluster, running

PREDICTIONS = [
    Prediction("throughput at 1", "0.9 to 1.1 of vLLM's: the engine's step dominates"),
    Prediction("throughput at 16", ">= 0.95 of vLLM's (goal)"),
    Prediction("throughput at 64", ">= 0.95 of vLLM's: one frame per step, whatever the number of streams"),
    Prediction("gateway CPU per token at 16", "100 to 150 us, nearly all of it vLLM's own front end"),
]
LEVELS = {1: 4, 16: 32, 64: 64}  # concurrency -> requests
TOKENS = 128
MAX_MODEL_LEN = 1024
CAPACITY = 64


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(t.user + t.system for t in (p.cpu_times() for p in processes))


def loaded(url: str, concurrency: int, requests: int, processes: Sequence[psutil.Process]) -> dict[str, float]:
    """Run the load client once; `processes` are the server's, whose CPU time is counted."""
    before = cpu_s(processes)
    command = [sys.executable, ROOT / "bench" / "load.py", url, *map(str, (concurrency, requests, TOKENS))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result | {"cpu_us_per_token": (cpu_s(processes) - before) / result["tokens"] * 1e6}


def server_processes(url: str) -> list[psutil.Process]:
    port = int(url.split(":")[2].split("/")[0])
    listener = next(
        c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == "LISTEN"
    )
    process = psutil.Process(listener)
    return [process, *process.children(recursive=True)]


def measure(cluster: Cluster, peer_url: str, rounds: int) -> dict[int, dict[str, list[dict[str, float]]]]:
    host = psutil.Process(cluster.replicas("demo", "ready")[0]["pid"])
    gateway = cluster.role("gateway")
    sides: dict[str, tuple[str, list[psutil.Process]]] = {
        "sllm": (cluster.base_url, [gateway, host]),
        "vllm": (peer_url, server_processes(peer_url)),
    }
    results: dict[int, dict[str, list[dict[str, float]]]] = {c: {"sllm": [], "vllm": []} for c in LEVELS}
    for url, processes in sides.values():
        loaded(url, 16, 16, processes)  # both sides compile and cache on first use
    for number in range(rounds):
        for concurrency, requests in LEVELS.items():
            for side in ("sllm", "vllm") if number % 2 else ("vllm", "sllm"):
                url, processes = sides[side]
                before = cpu_s([gateway])
                result = loaded(url, concurrency, requests, processes)
                if side == "sllm":
                    result["gateway_cpu_us_per_token"] = (cpu_s([gateway]) - before) / result["tokens"] * 1e6
                results[concurrency][side].append(result)
        console.print(f"round {number + 1} done")
    return results


def digest(results: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    ours, theirs = results["sllm"], results["vllm"]
    pairs = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours, theirs, strict=True)]
    return {
        "throughput_ratio": summary(pairs),
        **{side: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for side, rows in results.items()},
    }


def show(digests: dict[int, dict[str, Any]]) -> None:
    columns = ["concurrency", "tok/s", "vLLM tok/s", "ratio", "TPOT ms", "vLLM", "CPU us/tok", "vLLM", "gateway us/tok"]
    rows = [
        [
            concurrency,
            d["sllm"]["tokens_per_s"],
            d["vllm"]["tokens_per_s"],
            d["throughput_ratio"]["median"],
            d["sllm"]["tpot_ms"],
            d["vllm"]["tpot_ms"],
            d["sllm"]["cpu_us_per_token"],
            d["vllm"]["cpu_us_per_token"],
            d["sllm"]["gateway_cpu_us_per_token"],
        ]
        for concurrency, d in digests.items()
    ]
    table("streaming: sllm against vLLM's own server (medians)", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running(folder, engine="vllm", nodes=1) as cluster:
            cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL))
            arguments = ["--engine-arg", "dtype=float32", "--max-model-len", str(MAX_MODEL_LEN), "--keep-alive", "1h"]
            arguments += ["--target-concurrency", str(CAPACITY // 4), "--min", "1"]
            cluster.cli("deploy", "demo", "--checkpoint", "demo", *arguments)
            log = folder / "vllm.log"
            with vllm_server(
                DEMO_MODEL, capacity=CAPACITY, max_model_len=MAX_MODEL_LEN, threads=threads, log=log
            ) as url:
                wait_until_up(url)
                digests = {c: digest(r) for c, r in measure(cluster, url, rounds).items()}
    show(digests)
    save("gateway", PREDICTIONS, {"tokens_per_request": TOKENS, "levels": {str(c): d for c, d in digests.items()}})


if __name__ == "__main__":
    main()
