"""Plotting: latencies as cumulative distributions, one line per run. matplotlib is imported only when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sllm.errors import InvalidArgument, InvalidConfiguration
from sllm.sim.result import Result


def check(path: Path) -> None:
    """Say before any work what would make a plot fail. Raises InvalidArgument."""
    if path.suffix.lower() != ".png":
        raise InvalidArgument(f"{path}: a plot is a .png file")
    if not path.parent.is_dir():
        raise InvalidArgument(f"{path.parent} is not a folder")
    if find_spec("matplotlib") is None:
        raise InvalidConfiguration(
            "plots need matplotlib, which is not installed", hint="pip install 'sllm[plot]', or leave --plot out"
        )


def draw(results: Sequence[Result], path: Path) -> None:
    """Write a PNG: the share of requests (y) that had a replica within so many seconds (x)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(result.policy for result in results))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="startup latency (s)", ylabel="share of requests", ylim=(0, 1.01))
    for result in results:
        count = len(result.latencies_s)
        seconds = [0.0, *result.latencies_s]
        shares = [number / count for number in range(count + 1)]
        color = f"C{policies.index(result.policy) % 10}"
        label = result.policy if result is _first(results, result.policy) else None
        axes.step(seconds, shares, where="post", color=color, alpha=0.7, label=label)
    axes.legend()
    figure.savefig(path, dpi=150)


def _first(results: Sequence[Result], policy: str) -> Result:
    return next(result for result in results if result.policy == policy)
