"""How fast is `sllm simulate`? Events and requests per CPU second, and what of it the production scheduler takes.

The paper's scenario (4 nodes, 32 models, 1.4 requests/s) and clusters that are several times as large, with as many
times the requests per second, under `ours`; and one model that is always warm, for which nothing is to be decided: what
the simulator itself takes. CPU seconds of one thread, of the best of some rounds: others may run beside it.

    .venv/bin/python bench/simulate.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from random import Random
from typing import Any

from common import ROOT, Prediction, console, save, table

from sllm.config import load
from sllm.core.snapshot import Snapshot
from sllm.scheduler.plan import Plan
from sllm.sim.policies import ours
from sllm.sim.scenario import Scenario, ScenarioConfig, scenario_of
from sllm.sim.simulation import Simulation
from sllm.sim.spec import ModelSpec
from sllm.sim.workload import Renewal, generate

PREDICTIONS = [
    Prediction("warm", "50,000 events/s: a heap, a grant and an end per request"),
    Prediction("x1", "500 requests/s, a quarter of it in the scheduler (as in trials)"),
    Prediction("x4, x16, x250", "as x1 (as in trials): a plan looks at what has changed, whatever else there is"),
    Prediction("goal", "a million requests on 1,000 nodes in 10 minutes is missed, by about four times"),
]
PAPER = ROOT / "examples" / "scenarios" / "paper-opt-6.7b.toml"
REQUESTS = {"x1": 1000, "x4": 1000, "x16": 1000, "x250": 20_000}  # x250: 1,000 nodes


class Timed:
    """The production scheduler, and the CPU seconds that it took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, snapshot: Snapshot, now: float, rng: Random) -> Plan:
        started = time.process_time()
        plan = ours(snapshot, now, rng)
        self.seconds += time.process_time() - started
        return plan


def larger(times: int, requests: int) -> Scenario:
    """The paper's cluster, so many times as large and as busy; each checkpoint is still on four nodes."""
    config = load(PAPER, ScenarioConfig)
    (nodes,), (models,), arrivals = config.nodes, config.models, config.arrivals
    assert arrivals.kind == "poisson"
    changed = {
        "nodes": [nodes.model_copy(update={"count": nodes.count * times})],
        "models": [models.model_copy(update={"count": models.count * times, "copies": 4})],
        "arrivals": arrivals.model_copy(update={"rate_rps": arrivals.rate_rps * times, "requests": requests}),
    }
    return scenario_of(config.model_copy(update=changed), PAPER.parent)


def warm() -> Scenario:
    """One model on one device, which takes all requests at once."""
    scenario = larger(1, 20_000)
    (node, *_), (model, *_) = scenario.cluster.nodes, scenario.cluster.models
    cluster = replace(scenario.cluster, nodes=(node,), models=(_always(model),), queue_length=20_000)
    arrivals = scenario.workload.arrivals
    assert isinstance(arrivals, Renewal)
    workload = replace(scenario.workload, models=[model.deployment.name], arrivals=replace(arrivals, rate_rps=100.0))
    return Scenario(cluster=cluster, workload=workload)


def _always(model: ModelSpec) -> ModelSpec:
    wish = replace(model.deployment, min_replicas=1, max_replicas=1, target_concurrency=1000)
    return replace(model, deployment=wish)


def measure(scenario: Scenario) -> dict[str, float]:
    arrivals = generate(scenario.workload, 1)
    decide = Timed()
    started = time.process_time()
    simulation = Simulation(scenario.cluster, arrivals, decide, seed=1)
    simulation.run()
    cpu_s = time.process_time() - started
    return {
        "cpu_s": cpu_s,
        "requests": len(arrivals),
        "events": simulation.events.count,
        "plans": simulation.controller.passes,
        "events_per_s": simulation.events.count / cpu_s,
        "requests_per_s": len(arrivals) / cpu_s,
        "plan_us": 1e6 * decide.seconds / max(1, simulation.controller.passes),
        "share_in_scheduler": decide.seconds / cpu_s,
        "simulated_s": simulation.events.now,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    scenarios = {"warm": warm(), **{name: larger(int(name[1:]), count) for name, count in REQUESTS.items()}}
    results: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        rounds = [measure(scenario) for _ in range(options.rounds)]
        results[name] = min(rounds, key=lambda values: values["cpu_s"]) | {
            "nodes": len(scenario.cluster.nodes),
            "models": len(scenario.cluster.models),
            "cpu_s_of_all_rounds": [values["cpu_s"] for values in rounds],
        }
        console.print(f"{name}: {results[name]['events_per_s']:.0f} events/s")
    columns = ("nodes", "models", "requests", "events/s", "requests/s", "us per plan", "in the scheduler")
    rows = [(name, *_row(values)) for name, values in results.items()]
    table("Simulating, per CPU second of one thread", ("", *columns), rows)
    save("simulate", PREDICTIONS, {"results": results})


def _row(of: dict[str, Any]) -> tuple[object, ...]:
    speeds = (f"{of[what]:.0f}" for what in ("events_per_s", "requests_per_s", "plan_us"))
    return (of["nodes"], of["models"], of["requests"], *speeds, f"{of['share_in_scheduler']:.0%}")


if __name__ == "__main__":
    main()
