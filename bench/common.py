"""What all benches share: the machine's description, paired ratios, a table on the terminal and JSON in results/."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Written before the first run, and kept beside what came out."""

    what: str
    expected: str


def machine() -> dict[str, Any]:
    """Describe where this ran; a figure without it means nothing."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": "cpu",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit(),
        "load_average": round(os.getloadavg()[0], 2),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, best and worst: these machines are noisy, so never one number alone."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def save(name: str, predictions: Sequence[Prediction], results: dict[str, Any]) -> None:
    """Write bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    document = {
        "bench": name,
        "machine": machine(),
        "predictions": [{"what": p.what, "expected": p.expected} for p in predictions],
        **results,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"written to {path.relative_to(ROOT)}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; floats get three significant digits."""
    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row])
    console.print(shown)
