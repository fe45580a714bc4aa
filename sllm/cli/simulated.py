"""Tables of simulations."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sllm.cli.output import Table

if TYPE_CHECKING:
    from sllm.sim.result import Result

_COLUMNS = ("MEAN", "P50", "P95", "P99", "GIVEN UP", "COLD", "RESUMED", "DEVICE HOURS", "WARM/QUEUED/DRAM/SSD")


def tables(results: Sequence[Result]) -> list[Table]:
    """One row per run, and, if a policy has several, one per policy: means, with the least and the most of the P99."""
    runs = Table(
        title="STARTUP LATENCY",
        columns=("POLICY", "SEED", "REQUESTS", *_COLUMNS),
        rows=tuple((result.policy, str(result.seed), str(result.requests), *_cells([result])) for result in results),
        empty="(no run has ended)",
    )
    by_policy: dict[str, list[Result]] = {}
    for result in results:
        by_policy.setdefault(result.policy, []).append(result)
    if len(results) == len(by_policy):
        return [runs]
    means = Table(
        title="MEANS OVER SEEDS",
        columns=("POLICY", "SEEDS", *_COLUMNS, "P99 FROM - TO"),
        rows=tuple(
            (name, str(len(of)), *_cells(of), f"{min(r.p99_s for r in of):.2f} - {max(r.p99_s for r in of):.2f} s")
            for name, of in by_policy.items()
        ),
    )
    return [runs, means]


def _cells(results: Sequence[Result]) -> tuple[str, ...]:
    def mean(value: Callable[[Result], float]) -> float:
        return statistics.fmean(value(result) for result in results)

    def count(value: Callable[[Result], float]) -> str:
        return f"{mean(value):.1f}".removesuffix(".0")

    kinds = list(results[0].tier_mix)
    return (
        f"{mean(lambda r: r.mean_s):.2f} s",
        f"{mean(lambda r: r.p50_s):.2f} s",
        f"{mean(lambda r: r.p95_s):.2f} s",
        f"{mean(lambda r: r.p99_s):.2f} s",
        count(lambda r: r.timeouts + r.refused),
        count(lambda r: r.cold_starts),
        count(lambda r: r.resumed),
        f"{mean(lambda r: r.device_hours):.2f}",
        "/".join(f"{_share(results, kind):.0%}" for kind in kinds),
    )


def _share(results: Sequence[Result], kind: str) -> float:
    return statistics.fmean(result.tier_mix[kind] for result in results)
