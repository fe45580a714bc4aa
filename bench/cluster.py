"""The paper's cluster figures, simulated: startup latency of our scheduler beside others, on the paper's 16 GPUs.

Reproduces OSDI'24 §7.3 and §7.4 (schedulers; RPS sweep) as far as they are published, and goes on where the paper
stops: bursts (CV 1-8), copies of each checkpoint (1, 2, 4 of 4 servers). 500 requests a run, 20 seeds, the same ones
for all policies; intervals are bootstraps over seeds, paired. Then how far each policy is from a clairvoyant optimum,
on clusters that are small enough for an exact one. The decisions are the controller's; the world is `sllm.sim`.

A whole run takes hours of CPU: every configuration is kept when it is done (.cache/bench-cluster.jsonl), and a run that
was ended goes on where it was. Figures are of one simulator: they tell policies apart, not clusters.

    .venv/bin/python bench/cluster.py [--seeds 20] [--requests 500] [--jobs 1] [--only TEXT] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster_optimum import optimum
from cluster_world import REGIMES, Configuration, scenario, tiny
from common import ROOT, Prediction, console, save, table
from paired import Ratio, ratio
from pieces import Pieces

from sllm.sim.policies import POLICIES
from sllm.sim.result import result_of
from sllm.sim.simulation import Simulation
from sllm.sim.workload import generate

OURS, GREEDY = "ours", "no-migration"
COMPARED = [name for name in (OURS, GREEDY, "random", "locality", "preemption") if name in POLICIES]
RPS = (0.2, 0.5, 0.8, 1.1, 1.4)
KEPT = ("mean_s", "p50_s", "p95_s", "p99_s", "timeouts", "refused", "starts", "resumed", "migrations", "device_hours")

Runs = dict[str, list[dict[str, Any]]]
"""The rows of one configuration, a seed each, by policy."""
Done = dict[Configuration, Runs]
Gaps = dict[str, list[tuple[float, float]]]
"""(waited, least possible) in seconds of each tiny cluster, by policy."""

PREDICTIONS = [
    Prediction("GSM8K, RPS 1.4, Poisson, P99: random", "2.0x ours (the paper: 1.95x)"),
    Prediction("GSM8K, RPS 1.4, Poisson, P99: preemption", "1.5x ours (the paper: 1.27x)"),
    Prediction("ShareGPT, RPS 1.1, 2 copies, P99: no migration", "2.5x ours: migration pays where copies are scarce"),
    Prediction("ShareGPT, RPS 1.1, 4 copies, P99: no migration", "1.0x ours: every server has the checkpoint"),
    Prediction("CV 8", "differences shrink: bursts of one model fill all devices, whoever places them"),
    Prediction("anywhere: no migration", "never better than ours beyond noise"),
    Prediction("tiny clusters, above the optimum", "no migration 25-46 % as in trials; ours below"),
]
PUBLISHED = {
    "GSM8K, RPS 1.4, P99: random / ours": 1.95,
    "GSM8K, RPS 1.4, P99: preemption / ours": 1.27,
    "OPT-6.7B GSM8K, mean": 0.8,
    "OPT-30B, mean": 7.5,
}


@dataclass(frozen=True, slots=True)
class Claim:
    """That `other` takes at least so many times what ours does at the 99th percentile."""

    of: Configuration
    other: str
    goal: float
    published: float | None = None


GSM8K = Configuration("opt-6.7b", "gsm8k", 1.4)
SCARCE = Configuration("opt-6.7b", "sharegpt", 1.1, copies=2)
CLAIMS = (
    Claim(GSM8K, "random", 1.9, PUBLISHED["GSM8K, RPS 1.4, P99: random / ours"]),
    Claim(GSM8K, "preemption", 1.4, PUBLISHED["GSM8K, RPS 1.4, P99: preemption / ours"]),
    Claim(SCARCE, GREEDY, 2.0),
)


def sweep() -> list[Configuration]:
    """The claims first; then the paper's figures, bursts, and copies."""
    found = [claim.of for claim in CLAIMS]
    for model in ("opt-6.7b", "opt-13b", "opt-30b"):
        found += [Configuration(model, data, rps) for data in ("gsm8k", "sharegpt") for rps in RPS]
    for data, rps in (("gsm8k", 1.4), ("sharegpt", 1.1)):
        found += [Configuration("opt-6.7b", data, rps, cv=cv) for cv in (1.0, 2.0, 4.0, 8.0)]
        found += [Configuration("opt-6.7b", data, rps, copies=copies) for copies in (1, 2, 4)]
        found += [Configuration("opt-6.7b", data, rps, cv=8.0, copies=2)]
    found.append(Configuration("opt-6.7b", "gsm8k-law", 1.4))
    return list(dict.fromkeys(found))


def run(of: Configuration, policy: str, seed: int, *, requests: int, traces: Path) -> dict[str, Any]:
    """One run: what is kept of it."""
    made = scenario(of, requests, traces)
    simulation = Simulation(made.cluster, generate(made.workload, seed), POLICIES[policy], seed=seed)
    simulation.run()
    row = result_of(simulation, policy=policy, seed=seed).row()
    return {key: row[key] for key in KEPT} | {"estimator_p50": row["estimator"]["p50"]}


def gaps(regime: str, policy: str, seeds: int) -> list[tuple[float, float]]:
    """(waited, least possible) in seconds, of each tiny cluster."""
    found = []
    for seed in range(1, seeds + 1):
        cluster, arrivals = tiny(regime, seed)
        simulation = Simulation(cluster, arrivals, POLICIES[policy], seed=seed)
        simulation.run()
        found.append((sum(r.waited_s for r in simulation.ended), optimum(cluster, arrivals)))
    return found


# -- running


class Runner:
    """Runs what is not there yet, and keeps it."""

    def __init__(self, options: argparse.Namespace, jobs: ProcessPoolExecutor) -> None:
        traces = options.traces if (options.traces / "gsm8k").is_dir() else None
        self.traced = traces is not None
        self._run = partial(run, requests=options.requests, traces=traces or Path("none"))
        self._seeds = range(1, options.seeds + 1)
        self._jobs = jobs
        settings = f"requests={options.requests} traces={self.traced}"
        self._pieces = Pieces(ROOT / ".cache" / "bench-cluster.jsonl", settings)

    def configuration(self, of: Configuration) -> Runs:
        """All runs of a configuration, by policy."""
        return {policy: list(self._runs(of, policy)) for policy in COMPARED}

    def _runs(self, of: Configuration, policy: str) -> Iterator[dict[str, Any]]:
        known: list[dict[str, Any]] = self._pieces.get(f"{of.name}: {policy}") or []
        missing = list(self._seeds)[len(known) :]
        if missing:
            known = [*known, *self._jobs.map(partial(self._run, of, policy), missing)]
            self._pieces.put(f"{of.name}: {policy}", known)
        return iter(known[: len(self._seeds)])

    def gaps(self, regime: str, seeds: int) -> Gaps:
        found = {}
        for policy in COMPARED:
            piece = f"tiny, {regime}, {seeds}: {policy}"
            if (known := self._pieces.get(piece)) is None:
                known = self._jobs.submit(gaps, regime, policy, seeds).result()
                self._pieces.put(piece, known)
            found[policy] = [(waited, least) for waited, least in known]
        return found


def column(runs: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in runs]


# -- telling


def latency_row(of: Configuration, runs: Runs) -> list[Any]:
    cells = [
        f"{statistics.fmean(column(runs[p], 'mean_s')):.2f} / {statistics.fmean(column(runs[p], 'p99_s')):.1f}"
        for p in COMPARED
    ]
    moved = statistics.fmean(column(runs[OURS], "migrations"))
    lost = max(statistics.fmean(column(runs[p], "timeouts")) for p in COMPARED)
    return [of.name, *cells, f"{moved:.1f}", f"{lost:.1f}"]


def ratio_row(of: Configuration, runs: Runs) -> list[Any]:
    return [of.name, *(str(against(runs, p, "p99_s")) for p in COMPARED if p != OURS)]


def against(runs: Runs, policy: str, key: str) -> Ratio:
    return ratio(column(runs[policy], key), column(runs[OURS], key))


def claims(done: Done) -> list[list[Any]]:
    rows = []
    for claim in CLAIMS:
        if claim.of not in done:
            continue
        if claim.other not in COMPARED:
            rows.append([claim.of.name, claim.other, f"{claim.goal}x", claim.published or "-", "no such policy", "-"])
            continue
        found = against(done[claim.of], claim.other, "p99_s")
        verdict = "yes" if found.low >= claim.goal else "perhaps" if found.high >= claim.goal else "NO"
        rows.append([claim.of.name, claim.other, f"{claim.goal}x", claim.published or "-", str(found), verdict])
    return rows


def worse(done: Done) -> list[list[Any]]:
    """Where ours is worse than plain greedy beyond noise."""
    if GREEDY not in COMPARED:
        return []
    compared = [(of, key, against(runs, GREEDY, key)) for of, runs in done.items() for key in ("mean_s", "p99_s")]
    return [[of.name, key, str(found)] for of, key, found in compared if found.high < 1.0]


def gap_row(regime: str, found: Gaps) -> list[Any]:
    return [regime, *(_gap(found[policy]) for policy in COMPARED)]


def _gap(pairs: Sequence[tuple[float, float]]) -> str:
    above = ratio([waited for waited, _ in pairs], [least for _, least in pairs])
    best = sum(waited <= least + 1e-6 for waited, least in pairs)
    return f"{above.value - 1:+.0%} ({above.low - 1:+.0%} to {above.high - 1:+.0%}), optimal in {best}/{len(pairs)}"


def report(
    done: Done,
    tiny_gaps: dict[str, Gaps],
) -> None:
    table(
        "Startup latency, s: mean / P99, means over seeds",
        ["", *COMPARED, "moved by ours", "timeouts, worst"],
        [latency_row(of, runs) for of, runs in done.items()],
    )
    others = [policy for policy in COMPARED if policy != OURS]
    table("P99 over ours, 95 % interval", ["", *others], [ratio_row(of, runs) for of, runs in done.items()])
    table("Claims", ["", "over ours", "goal", "the paper", "measured, P99", "holds"], claims(done))
    if found := worse(done):
        table("Worse than plain greedy beyond noise", ["", "of", "greedy / ours"], found)
    table(
        "Waits above a clairvoyant optimum, on tiny clusters",
        ["", *COMPARED],
        [gap_row(regime, found) for regime, found in tiny_gaps.items()],
    )


def summary_of(done: Done) -> list[dict[str, Any]]:
    found = []
    for of, runs in done.items():
        means = {policy: {key: statistics.fmean(column(rows, key)) for key in KEPT} for policy, rows in runs.items()}
        others = [policy for policy in COMPARED if policy != OURS]
        ratios = {p: {key: asdict(against(runs, p, key)) for key in ("mean_s", "p99_s")} for p in others}
        found.append({**asdict(of), "seeds": len(runs[OURS]), "means": means, "over_ours": ratios})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--instances", type=int, default=100, help="tiny clusters of each kind")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="configurations whose name has this in it")
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--quick", action="store_true", help="two configurations, two seeds; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.requests, options.instances = min(2, options.seeds), 60, 5
    wanted = [of for of in sweep() if options.only in of.name][: 2 if options.quick else None]
    with ProcessPoolExecutor(options.jobs) as jobs:
        runner = Runner(options, jobs)
        if not runner.traced:
            console.print(f"no traces at {options.traces}: lengths of GSM8K are drawn from an assumed law")
        done, began = {}, time.monotonic()
        for number, of in enumerate(wanted, 1):
            done[of] = runner.configuration(of)
            console.print(f"{number}/{len(wanted)} {of.name}: {time.monotonic() - began:.0f} s")
        tiny_gaps = {regime: runner.gaps(regime, options.instances) for regime in REGIMES}
    report(done, tiny_gaps)
    if options.quick or options.only:
        return
    gaps_saved = {regime: {p: _gap(pairs) for p, pairs in found.items()} for regime, found in tiny_gaps.items()}
    results = {"seeds": options.seeds, "requests": options.requests, "traced": runner.traced, "policies": COMPARED}
    results |= {"claims": claims(done), "worse_than_greedy": worse(done), "configurations": summary_of(done)}
    save("cluster", PREDICTIONS, {**results, "published": PUBLISHED, "above_optimum": gaps_saved})


if __name__ == "__main__":
    main()
