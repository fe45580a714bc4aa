"""Request -> first token from zero replicas, rung by rung, against vLLM's own server started cold.

Reproduces the paper's point that startup time is what a serverless system is judged by (OSDI'24, §2 and §7), for the
rungs there are: cold process, warm process + SSD, warm process + DRAM, awake. Sides alternate in one run.

    .venv/bin/python bench/startup.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
from common import ROOT, Prediction, console, save, summary, table
from peer import vllm_server, wait_until_up

sys.path.insert(0, str(ROOT / "tests"))
from e2e.cluster import DEMO_MODEL, Cluster, running

PREDICTIONS = [
    Prediction("vLLM, cold", "about 21 s: three processes import torch and vLLM, then the engine is built"),
    Prediction("cold process", "about 8 s: one import of 7 s, then as warm"),
    Prediction("warm process + SSD", "0.5 s: fork, engine construction, 7 MB read"),
    Prediction("warm process + DRAM", "0.45 s; at most 1/20 of vLLM's and at most 2 s"),
    Prediction("awake", "0.02 s: one prefill and the wire"),
]
MAX_MODEL_LEN = 1024


def first_token_s(base_url: str) -> float:
    started = time.monotonic()
    client = openai.OpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=300)
    stream = client.completions.create(model="demo", prompt="Python is", max_tokens=4, temperature=0, stream=True)
    for chunk in stream:
        if chunk.choices and chunk.choices[0].text:
            elapsed = time.monotonic() - started
            stream.close()
            return elapsed
    raise AssertionError("a stream without a token")


def vllm_cold_s(threads: int, log: Path) -> float:
    started = time.monotonic()
    with vllm_server(DEMO_MODEL, capacity=32, max_model_len=MAX_MODEL_LEN, threads=threads, log=log) as url:
        wait_until_up(url)
        first_token_s(url)
        return time.monotonic() - started


def to_zero(cluster: Cluster) -> None:
    cluster.cli("scale", "demo", "--replicas", "0")


def warm_again(cluster: Cluster) -> None:
    cluster.until(lambda: all(n["state"] == "ready" and n["warm"] for n in cluster.json("nodes")), "warm", 120)


def warm_process_of(cluster: Cluster) -> Any:
    hosts = {r["pid"] for r in cluster.json("status")["replicas"]}
    return next(p for p in cluster.processes() if "sllm.engine.warm" in p.cmdline() and p.pid not in hosts)


def drop_page_cache(cluster: Cluster) -> None:
    for weights in (cluster.state / "node-1").rglob("*.safetensors"):
        fd = os.open(weights, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def rung_cold_process(cluster: Cluster) -> float:
    to_zero(cluster)
    warm_process_of(cluster).kill()
    elapsed = first_token_s(cluster.base_url)
    warm_again(cluster)
    return elapsed


def rung_ssd(cluster: Cluster) -> float:
    """The pool dies with its agent, so a restarted agent has the checkpoint on SSD only."""
    to_zero(cluster)
    agent = cluster.role("node-1")
    agent.kill()
    cluster.until(lambda: cluster.restarted("node-1", agent), "a new agent", 60)
    cluster.until(lambda: cluster.json("nodes")[0]["tiers"]["dram"]["used_bytes"] == 0, "an empty pool", 60)
    warm_again(cluster)
    drop_page_cache(cluster)
    return first_token_s(cluster.base_url)


def rung_dram(cluster: Cluster) -> float:
    to_zero(cluster)
    return first_token_s(cluster.base_url)


def rung_awake(cluster: Cluster) -> float:
    return first_token_s(cluster.base_url)


RUNGS = {
    "cold process": rung_cold_process,
    "warm process + SSD": rung_ssd,
    "warm process + DRAM": rung_dram,
    "awake": rung_awake,
}


def measure(rounds: int, folder: Path) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"vLLM, cold": [], **{rung: [] for rung in RUNGS}}
    with running(folder, engine="vllm", nodes=1) as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL))
        arguments = ["--engine-arg", "dtype=float32", "--max-model-len", str(MAX_MODEL_LEN), "--keep-alive", "1h"]
        cluster.cli("deploy", "demo", "--checkpoint", "demo", *arguments)
        warm_again(cluster)
        first_token_s(cluster.base_url)  # the front end is made once, at first use
        for number in range(rounds):
            times["vLLM, cold"].append(vllm_cold_s(os.cpu_count() or 1, folder / "vllm.log"))
            for rung, run in RUNGS.items():
                times[rung].append(run(cluster))
            console.print(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:.3f} s" for k, v in times.items()))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        times = measure(rounds, Path(folder))
    peer = summary(times["vLLM, cold"])["median"]
    rows = [[name, *summary(v).values(), peer / summary(v)["median"]] for name, v in times.items()]
    table("request -> first token, seconds", ["from", "median", "best", "worst", "n", "vLLM cold / this"], rows)
    save("startup", PREDICTIONS, {"seconds": {name: summary(v) | {"all": v} for name, v in times.items()}})


if __name__ == "__main__":
    main()
