"""Loading checkpoints: against the disk's limit, against other loaders, from DRAM, and what each idea is worth.

Reproduces the paper's loading figures (OSDI'24, §7.2: loading time, LoRA adapters, breakdown) at the size of this
machine. Loaders take turns within one run; the disk is a RAM-backed one (bench/ramdev.sh), because real ones drift.

    make bench-loader                                   # all cases, as root; about half an hour on 2 cores
    .cache/bench-venv/bin/python bench/loader.py --case moe --rounds 9
    .venv/bin/python bench/loader.py --quick            # a smoke run without root and peers; its figures mean nothing
    .venv/bin/python bench/loader.py --device cuda      # not yet run on a GPU

Each case writes bench/results/loader-CASE.json.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial

import loader_breakdown
import loader_cases
import loader_cuda
import loader_dram
import loader_random
import torch
from common import Prediction, console
from loader_measure import in_fork
from loader_peers import POOL
from loader_report import Result, show, write

WIDTH = 140  # of tables in a file or a pipe
PREDICTIONS = {
    "fast": [
        Prediction("fio psync 1M x2", "0.18-0.21 s, 6-7 GB/s, 0.04 CPU s/GB"),
        Prediction("fio, the best setting", "0.145 s, 8.2 GB/s: psync 8M x4 or 1M x2 with huge pages"),
        Prediction("sllm, pool", "0.15-0.17 s: xxh3 costs 1-3 % of time, 0.035 CPU s/GB of 0.05"),
        Prediction("sllm, fresh memory", "0.23-0.26 s: zeroing huge pages is 0.06 s/GB"),
        Prediction("peers", "Run:ai 0.31 s, load_file 0.58, torch.load 1.0, fastsafetensors 0.8, tensorizer 0.73"),
    ],
    "slow": [Prediction("everything but torch.load and load_file", "0.54-0.56 s: the disk is the limit")],
    "lora": [Prediction("sllm, pool", "18-21 ms; the best peer, Run:ai, 45-50 ms")],
    "moe": [
        Prediction("sllm, pool", "0.21-0.23 s; Run:ai 0.40-0.53, load_file 0.97, torch.load 1.7"),
        Prediction("last byte -> last view", "10-15 ms: 1.5 us a view"),
    ],
    "dram": [
        Prediction("pool of 4 KiB pages", "1 ms, then 0.075 s per GB of faults in the first pass"),
        Prediction("pool of huge pages", "1 ms, and a first pass like the second"),
    ],
    "breakdown": [
        Prediction("all steps together", "about 7x; the pinned pool alone 3x: memory is the dear part here"),
        Prediction("+ threads", "1.0-1.1x: one reader nearly saturates a disk without latency"),
    ],
    "random": [
        Prediction(
            "sllm, node's pool",
            "reads 46-52 ms, p99 within 1.5x of p50; hits, a quarter of all, 2 ms: huge pages are mapped at once",
        ),
        Prediction("load_file", "130-160 ms mean, p99 over 2x of p50: some of the pages are still there"),
    ],
    "cuda": [Prediction("sllm, pool -> GPU", "the disk's time: the link carries 25-50 GB/s, far more than one disk")],
}


def cases(rounds: int, *, quick: bool) -> dict[str, Callable[[], Result]]:
    """Return what can be run on a CPU, by name."""
    races = {case.name: partial(loader_cases.run, case, rounds, quick=quick) for case in loader_cases.CASES}
    return races | {
        "dram": lambda: loader_dram.run(rounds, quick=quick),
        "breakdown": lambda: loader_breakdown.run(rounds, quick=quick),
        "random": lambda: loader_random.run(quick=quick),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[*PREDICTIONS], help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, help="default 7, and 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="small checkpoints in a plain folder; writes no results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    given.rounds = given.rounds or (2 if given.quick else 7)
    return given


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # disks in memory and huge pages are given back
    given = arguments()
    runs = cases(given.rounds, quick=given.quick)
    if given.device == "cuda":
        if not in_fork(torch.cuda.is_available):  # once CUDA was asked anything here, forks could not use it
            raise SystemExit("there is no GPU here that torch can use")
        runs = {"cuda": lambda: loader_cuda.run(given.rounds, quick=given.quick)}
    if not console.is_terminal:
        console.width = WIDTH
    missed = 0
    for name in given.case or runs:
        if name not in runs:
            raise SystemExit(f"{name} is no case for --device {given.device}")
        console.print(f"\n[bold]{name}[/bold]")
        result = runs[name]()
        show(result, POOL.name)
        missed += sum(not goal.met for goal in result.goals)
        if not given.quick:
            write(result, PREDICTIONS[name])
    console.print("a smoke run: its figures mean nothing" if given.quick else f"goals not met: {missed}")


if __name__ == "__main__":
    main()
