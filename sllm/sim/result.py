"""Result: what one run shows, as numbers. Latency is startup latency: for how long a client waited for a replica."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sllm.core.startup import EstimatorError
from sllm.sim.request import Outcome, Served
from sllm.sim.simulation import Simulation

_CDF_POINTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Latencies are of all requests: from its arrival until a replica began with it, and, if it lost that, until what
    it had was computed again; one that was given up waited until then, one that was refused for the timeout.
    `cold_starts` are requests that waited for a start of their own; `starts` counts replicas that were started,
    `resumed` how often a request lost its replica and went on, `stopped_busy` replicas that were stopped with requests.
    `migrations` are handovers under a running request. `estimator` is how wrong the estimates of starts were.
    `tier_mix` has what requests had to wait for, in shares of those that got a replica. `cdf` has (share of requests,
    seconds within which they had a replica); `latencies_s` are all of them, the least first."""

    policy: str
    seed: int
    requests: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float
    timeouts: int
    refused: int
    cold_starts: int
    starts: int
    resumed: int
    stopped_busy: int
    migrations: int
    tier_mix: dict[str, float]
    estimator: EstimatorError
    device_hours: float
    simulated_s: float
    events: int
    plans: int
    cdf: tuple[tuple[float, float], ...]
    latencies_s: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """All but the single latencies, for JSON."""
        values = asdict(self)
        del values["latencies_s"]
        return values


def result_of(simulation: Simulation, *, policy: str, seed: int) -> Result:
    """Sum up a run that is over."""
    ended = [request for request in simulation.ended if request.arrival.counted]
    timeout_s = simulation.cluster.timeout_s
    latencies = sorted(timeout_s if r.outcome is Outcome.REFUSED else r.waited_s for r in ended)
    served = Counter(request.served for request in ended if request.served is not None)
    outcomes = Counter(request.outcome for request in ended)
    total = served.total()
    return Result(
        policy=policy,
        seed=seed,
        requests=len(ended),
        mean_s=math.fsum(latencies) / len(latencies) if latencies else 0.0,
        p50_s=percentile(latencies, 0.50),
        p95_s=percentile(latencies, 0.95),
        p99_s=percentile(latencies, 0.99),
        max_s=percentile(latencies, 1.0),
        timeouts=outcomes[Outcome.TIMED_OUT],
        refused=outcomes[Outcome.REFUSED],
        cold_starts=served[Served.DRAM] + served[Served.SSD],
        starts=simulation.controller.starts,
        resumed=sum(request.losses for request in ended),
        stopped_busy=simulation.controller.stopped_busy,
        migrations=simulation.controller.migrations,
        tier_mix={kind.value: served[kind] / total if total else 0.0 for kind in Served},
        estimator=simulation.controller.estimator.error,
        device_hours=simulation.device_s() / 3600,
        simulated_s=simulation.events.now,
        events=simulation.events.count,
        plans=simulation.controller.passes,
        cdf=tuple((n / _CDF_POINTS, percentile(latencies, n / _CDF_POINTS)) for n in range(1, _CDF_POINTS + 1)),
        latencies_s=tuple(latencies),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the least value that at least this share of the values do not exceed; 0 if there is none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
