"""Startup times as they were predicted, beside what they took: the real engine, started again and again.

Reproduces the paper's claim that loading is predictable where a server loads one checkpoint at a time (OSDI'24, §5.1),
for the whole start: queue, fork, loading, building. From DRAM, and from SSD (a pool too small for the checkpoint).

    .venv/bin/python bench/estimator.py [--starts 25]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, Prediction, console, save, table

sys.path.insert(0, str(ROOT / "tests"))
from e2e.cluster import DEMO_MODEL, running

PREDICTIONS = [
    Prediction("from DRAM", "wrong by 5% at the median, 20% at p95: what is left is the engine's construction"),
    Prediction("from SSD", "the same: reading 14 MB is hidden behind the fork"),
]
LEARNT_AFTER = 5  # starts; those before are not judged
POOLS: dict[str, tuple[str, ...]] = {"from DRAM": (), "from SSD": ("agent.store.dram_bytes=8388608",)}


def starts_of(folder: Path, settings: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    """Start a replica so many times, and return each start as the controller tells of it."""
    found = []
    with running(folder, engine="vllm", nodes=1, settings=settings) as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL))
        cluster.until(lambda: all(node["warm"] for node in cluster.json("nodes")), "warm", 120)
        arguments = ["--engine-arg", "dtype=float32", "--max-model-len", "512"]
        cluster.cli("deploy", "demo", "--checkpoint", "demo", *arguments)
        for _ in range(count):
            cluster.cli("scale", "demo", "--replicas", "1")
            found.append(cluster.json("explain", "demo")["decisions"][0])
            cluster.cli("scale", "demo", "--replicas", "0")
    return found


def errors_of(starts: list[dict[str, Any]]) -> list[float]:
    judged = starts[LEARNT_AFTER:]
    return sorted(abs(s["estimate"]["total_s"] - s["measured_s"]) / s["measured_s"] for s in judged)


def row(name: str, starts: list[dict[str, Any]]) -> list[Any]:
    errors, measured = errors_of(starts), [s["measured_s"] for s in starts[LEARNT_AFTER:]]
    spread = f"{min(measured):.3f} - {max(measured):.3f}"
    p95 = errors[min(len(errors) - 1, int(0.95 * len(errors)))]
    return [name, statistics.median(measured), spread, statistics.median(errors), p95, len(errors)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=25)
    count = parser.parse_args().starts
    runs = {}
    for name, settings in POOLS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = starts_of(Path(folder), settings, count)
        console.print(f"{name}: {count} starts")
    columns = ["start", "measured, s", "from - to", "error, median", "error, p95", "n"]
    table(f"predicted against measured, after {LEARNT_AFTER} starts", columns, [row(n, s) for n, s in runs.items()])
    kept = ("measured_s", "phases_s", "estimate")
    save("estimator", PREDICTIONS, {n: [{key: s[key] for key in kept} for s in starts] for n, starts in runs.items()})


if __name__ == "__main__":
    main()
