"""What a case found: samples by loader, goals with whether they are met, tables, and a file in results/."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import Prediction, console, save, summary, table
from loader_measure import Sample

Samples = dict[str, list[Sample]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """`value` is what was measured, in the unit that `what` names; it must be at least, or at most, `target`."""

    what: str
    target: float
    value: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one case found. `size_bytes` counts the tensors' bytes; `left_out` maps a loader to why it is not there."""

    case: str
    title: str
    size_bytes: int = 0
    samples: Samples = field(default_factory=dict)
    goals: Sequence[Goal] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def median_s(samples: Samples, name: str) -> float:
    return statistics.median(sample.seconds for sample in samples[name])


def cpu_s_per_gb(samples: Samples, name: str, size_bytes: int) -> float:
    return statistics.median(sample.cpu_s for sample in samples[name]) / size_bytes * 1e9


def ratio(samples: Samples, slower: str, faster: str) -> float:
    """Return how many times faster: the median over rounds of the two times of that round, as both drift together."""
    pairs = zip(samples[slower], samples[faster], strict=True)
    return statistics.median(a.seconds / b.seconds for a, b in pairs)


def best_of(samples: Samples, names: Sequence[str]) -> str:
    """Return the name with the least median."""
    return min(names, key=lambda name: median_s(samples, name))


# --- output ---------------------------------------------------------------------------------


def show(result: Result, against: str) -> None:
    """Print the tables of a case; `against` is the loader that the others are compared with."""
    if result.samples:
        columns = ["loader", "median s", "best", "worst", "n", "GB/s", "CPU s/GB", f"time / {against}"]
        table(result.title, columns, [_row(result, name, against) for name in result.samples])
    for name, why in result.left_out.items():
        console.print(f"  left out: {name}: {why}")
    if result.goals:
        rows = [
            [g.what, f"{'>=' if g.at_least else '<='} {g.target:g}", g.value, "met" if g.met else "NOT MET"]
            for g in result.goals
        ]
        table(f"{result.title}: goals", ["", "goal", "measured", ""], rows)


def _row(result: Result, name: str, against: str) -> list[Any]:
    seconds = summary([sample.seconds for sample in result.samples[name]])
    speed = result.size_bytes / seconds["median"] / 1e9
    cpu = cpu_s_per_gb(result.samples, name, result.size_bytes)
    compared = ratio(result.samples, name, against) if against in result.samples else "-"
    return [name, seconds["median"], seconds["min"], seconds["max"], seconds["n"], speed, cpu, compared]


def write(result: Result, predictions: Sequence[Prediction]) -> None:
    """Write bench/results/loader-CASE.json."""
    save(f"loader-{result.case}", predictions, document(result))


def document(result: Result) -> dict[str, Any]:
    return {
        "title": result.title,
        "size_bytes": result.size_bytes,
        "goals": [
            {"what": g.what, "target": g.target, "at_least": g.at_least, "measured": g.value, "met": g.met}
            for g in result.goals
        ],
        "loaders": {name: _figures(samples, result.size_bytes) for name, samples in result.samples.items()},
        "left_out": result.left_out,
        **result.facts,
    }


def _figures(samples: list[Sample], size_bytes: int) -> dict[str, Any]:
    return {
        "seconds": summary([s.seconds for s in samples]) | {"all": [s.seconds for s in samples]},
        "cpu_s_per_gb": statistics.median(s.cpu_s for s in samples) / size_bytes * 1e9,
    }
