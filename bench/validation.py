"""Does the simulator foretell a live cluster? The same requests through real processes and through a simulation.

`sllm dev` (controller, gateway, agents, real loader; the fake engine, which computes on a clock) learns for a while;
then it is described as for `sllm simulate --from-cluster`, and the same requests are sent to it and to the simulation
that begins from the description. What a client waits for its first token is compared: live, and simulated plus what a
request takes that finds a ready replica (gateway, wire and first step: measured before). Then every plan that the live
controller has made is made again from its snapshot.

The simulation knows the requests' times as they were sent, no latency of the run. A machine that was stopped meanwhile
tells nothing: the longest time that this process was not woken is said.

    .venv/bin/python bench/validation.py [--requests 60] [--rounds 3] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from common import ROOT, Prediction, console, save, table

sys.path.insert(0, str(ROOT / "tests"))
from e2e.cluster import DEMO_MODEL, Cluster, running
from e2e.operator import Operator

from sllm.core.description import ClusterDescription
from sllm.core.ids import DeploymentName
from sllm.sim.live import WhatIf, live_cluster
from sllm.sim.policies import POLICIES
from sllm.sim.replay import differences, read_record
from sllm.sim.result import percentile
from sllm.sim.simulation import Simulation
from sllm.sim.spec import Arrival

PREDICTIONS = [
    Prediction("median of the first token's wait, simulated against live", "within 10 %"),
    Prediction("p95", "within 25 %: live starts beside each other share two cores, simulated ones do not"),
    Prediction("plans made again", "all of them, exactly"),
]
MODELS = tuple(DeploymentName(f"model-{number}") for number in range(1, 7))
NODES = 3
TOKENS, TOKEN_S = 40, 0.025
BUILD_S = 1.0  # of the fake engine
RATE_RPS = 0.5
LEARNING = 24  # requests
GOAL = 0.10
STALLED_S = 0.5
WATCHED_S = 0.05


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was sent, seconds after the first; `waited_s` until its first token."""

    at: float
    model: DeploymentName
    waited_s: float


class Stalls:
    """How much later than it should have been this process was woken, at worst: it, or the machine, was stopped."""

    def __init__(self) -> None:
        self.worst_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Stalls:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(WATCHED_S):
            now = time.monotonic()
            self.worst_s = max(self.worst_s, now - before - WATCHED_S)
            before = now


def ask(cluster: Cluster, model: DeploymentName, at: float, began: float) -> Asked:
    """Send one request at its time, and read its stream to the end."""
    time.sleep(max(0.0, began + at - time.monotonic()))
    sent = time.monotonic()
    messages = [{"role": "user", "content": "hello"}]
    with cluster.client().chat.completions.create(
        model=model, messages=messages, max_tokens=TOKENS, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(stream)
        waited_s = time.monotonic() - sent
        for _ in stream:
            pass
    return Asked(sent - began, model, waited_s)


def send(cluster: Cluster, count: int, seed: int) -> list[Asked]:
    """Poisson arrivals, each for any of the models."""
    rng = Random(seed)
    at, rows = 0.0, []
    for _ in range(count):
        at += rng.expovariate(RATE_RPS)
        rows.append((at, rng.choice(MODELS)))
    began = time.monotonic() + 0.5
    with ThreadPoolExecutor(count) as threads:
        asked = [threads.submit(ask, cluster, model, at, began) for at, model in rows]
        return sorted((future.result() for future in asked), key=lambda a: a.at)


def warm_s(cluster: Cluster) -> float:
    """What a first token takes from a replica that is ready: the median of some."""
    cluster.cli("scale", MODELS[0], "--replicas", "1")
    waits = [ask(cluster, MODELS[0], 0.0, time.monotonic()).waited_s for _ in range(7)]
    cluster.cli("scale", MODELS[0], "--min", "0", "--max", "2")
    return statistics.median(waits)


def simulated(told: ClusterDescription, asked: Sequence[Asked], seed: int) -> list[float]:
    """What the same requests wait in a simulation that begins from the cluster as it was."""
    cluster = live_cluster(told, WhatIf(token_s=TOKEN_S)).cluster
    arrivals = [Arrival(at=a.at, deployment=a.model, prompt_tokens=8, output_tokens=TOKENS) for a in asked]
    simulation = Simulation(cluster, arrivals, POLICIES["ours"], seed=seed)
    simulation.run()
    return [request.waited_s for request in sorted(simulation.ended, key=lambda r: r.number)]


def compare(cluster: Cluster, operator: Operator, count: int, seed: int, base_s: float) -> dict[str, Any]:
    told = operator.describe()
    with Stalls() as stalls:
        asked = send(cluster, count, seed)
    live = [a.waited_s for a in asked]
    foretold = [waited_s + base_s for waited_s in simulated(told, asked, seed)]
    return {
        "requests": len(asked),
        "live": _quantiles(live),
        "simulated": _quantiles(foretold),
        "median_off": percentile(sorted(foretold), 0.5) / percentile(sorted(live), 0.5) - 1,
        "stalled_s": stalls.worst_s,
        "pairs": [
            (round(a.at, 3), a.model, round(a.waited_s, 3), round(f, 3)) for a, f in zip(asked, foretold, strict=True)
        ],
    }


def _quantiles(waits: Sequence[float]) -> dict[str, float]:
    ordered = sorted(waits)
    return {
        "mean_s": statistics.fmean(ordered),
        "p50_s": percentile(ordered, 0.5),
        "p95_s": percentile(ordered, 0.95),
        "max_s": ordered[-1],
    }


def validate(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    record = folder / "plans.jsonl"
    environment = {"SLLM_FAKE_TOKEN_S": str(TOKEN_S), "SLLM_FAKE_LOAD_S": str(BUILD_S)}
    settings = (f"controller.record={record}",)
    with running(folder, engine="fake", nodes=NODES, environment=environment, settings=settings) as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        cluster.until(lambda: all(node["warm"] for node in cluster.json("nodes")), "warm", 240)
        scaling = ("--keep-alive", "1s", "--target-concurrency", "1", "--max", "2")
        for name in MODELS:
            cluster.cli("deploy", name, "--checkpoint", "demo", *scaling)
        base_s = warm_s(cluster)
        send(cluster, options.learning, seed=0)
        console.print(f"learnt; a ready replica's first token takes {base_s:.3f} s")
        with Operator(cluster) as operator:
            rounds = []
            for seed in range(1, options.rounds + 1):
                cluster.until(lambda: not cluster.json("status")["replicas"], "all are let go", 240)
                rounds.append(compare(cluster, operator, options.requests, seed, base_s))
                console.print(f"round {seed}: median off by {rounds[-1]['median_off']:+.1%}")
            wrong = cluster.json("status")["estimator"]
    plans = list(read_record(record))
    actions = Counter(action["is"] for plan in plans for action in plan.plan["actions"])
    other = [found.line for found, _ in differences(record, POLICIES["ours"])]
    return {
        "warm_s": base_s,
        "rounds": rounds,
        "estimator": wrong,
        "plans": {"made": len(plans), "actions": dict(actions), "other_when_made_again": other},
    }


def tell(found: dict[str, Any]) -> None:
    rows: list[list[Any]] = []
    for number, one in enumerate(found["rounds"], 1):
        rows += [[number, what, *(f"{value:.3f}" for value in one[what].values())] for what in ("live", "simulated")]
        stalled = f", stopped for {one['stalled_s']:.1f} s" if one["stalled_s"] > STALLED_S else ""
        rows.append([number, f"median off by {one['median_off']:+.1%}{stalled}", "", "", "", ""])
    table("First token, s", ["round", "", "mean", "p50", "p95", "max"], rows)
    off = statistics.median(abs(one["median_off"]) for one in found["rounds"])
    console.print(f"medians are off by {off:.1%} (goal {GOAL:.0%}): {'reached' if off <= GOAL else 'MISSED'}")
    plans = found["plans"]
    console.print(f"{plans['made']} plans, {len(plans['other_when_made_again'])} of them another one when made again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--learning", type=int, default=LEARNING)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one short round; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.learning, options.rounds = 10, 6, 1
    with tempfile.TemporaryDirectory() as folder:
        found = validate(Path(folder), options)
    tell(found)
    if not options.quick:
        save("validation", PREDICTIONS, found)


if __name__ == "__main__":
    main()
