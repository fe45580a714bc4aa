"""Twenty checkpoints loaded in random order through memory that holds five: the paper's point that latency stays flat.

Ours: a node's pool, with the product's own policy of what goes, readers and mapping (loader_node.py). The contrast:
safetensors' load_file with as much page cache (a memory cgroup limits it), whose latency depends on which pages the
kernel happened to keep.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import console, table
from loader_checkpoints import Tensors, size_of, write_safetensors, write_sllm
from loader_device import Device, huge_pages, plain_folder, ram_device
from loader_measure import drop_cache, in_fork, prewarm, stopwatch, touch
from loader_node import NodePool
from loader_peers import LOAD_FILE, load_file, pool_bytes
from loader_report import Result

NODE_POOL = "sllm, node's pool"
MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")
# What the measured process takes beside the page cache: the interpreter's own pages as they are copied, heaps.
SLACK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`loads` in random order, of `checkpoints`, through memory that holds `room`."""

    kind: str
    checkpoints: int
    room: int
    loads: int

    def order(self) -> list[int]:
        return random.Random(20).choices(range(self.checkpoints), k=self.loads)


FULL = Plan(kind="small", checkpoints=20, room=5, loads=200)
QUICK = Plan(kind="tiny", checkpoints=4, room=2, loads=12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    seconds: float
    hit: bool


def run(*, quick: bool) -> Result:
    plan = QUICK if quick else FULL
    total_bytes = 2 * plan.checkpoints * size_of(plan.kind)
    with ExitStack() as stack:
        device = stack.enter_context(plain_folder() if quick else ram_device(total_bytes))
        in_fork(lambda: _write(plan, device.folder))
        limit = stack.enter_context(_memory_limit(plan.room * size_of(plan.kind) + SLACK_BYTES))
        huge = stack.enter_context(huge_pages(_pool_bytes(plan, device), reserve=not quick))
        latencies = {
            NODE_POOL: in_fork(partial(_through_pool, plan, device)),
            LOAD_FILE.name: in_fork(partial(_through_page_cache, plan, device, limit)),
        }
    figures = {name: _figures(each) for name, each in latencies.items()}
    title = f"{plan.checkpoints} checkpoints of {size_of(plan.kind) / 1e6:.0f} MB in random order, room for {plan.room}"
    _show(title, figures)
    left_out = {} if limit else {"a limit to the page cache": "there is no cgroup-v1 memory controller, or no root"}
    for why in left_out.values():
        console.print(f"  the page cache was not limited: {why}")
    return Result(
        case="random",
        title=title,
        size_bytes=size_of(plan.kind),
        left_out=left_out,
        facts={"disk": device.name, "quick": quick, "loads": plan.loads, "huge_pages": huge, "latencies": figures},
    )


def _write(plan: Plan, folder: Path) -> None:
    for number in range(plan.checkpoints):
        write_safetensors(plan.kind, folder / "safetensors" / str(number), salt=number)
        write_sllm(folder / "safetensors" / str(number), folder / "sllm" / str(number))
        drop_cache(folder)


def _through_pool(plan: Plan, device: Device) -> list[Latency]:
    folders = [device.folder / "sllm" / str(number) for number in range(plan.checkpoints)]
    pool = NodePool(_pool_bytes(plan, device))
    return _latencies(
        plan, device, lambda number: pool.load(folders[number]), lambda number: pool.holds(folders[number])
    )


def _pool_bytes(plan: Plan, device: Device) -> int:
    return plan.room * pool_bytes(device.folder / "sllm" / "0")


def _through_page_cache(plan: Plan, device: Device, limit: Path | None) -> list[Latency]:
    if limit:
        limit.write_text(str(os.getpid()))
    folders = device.folder / "safetensors"
    return _latencies(plan, device, lambda number: load_file(folders / str(number))(), lambda number: False)


def _latencies(
    plan: Plan, device: Device, load: Callable[[int], Tensors], is_hit: Callable[[int], bool]
) -> list[Latency]:
    prewarm(size_of(plan.kind))
    drop_cache(device.folder)
    latencies = []
    for number in plan.order():
        hit = is_hit(number)
        with stopwatch() as watch:
            touch(load(number))
        latencies.append(Latency(seconds=watch.sample().seconds, hit=hit))
    return latencies


@contextmanager
def _memory_limit(size_bytes: int) -> Iterator[Path | None]:
    """Make a memory cgroup; yield its cgroup.procs file, or None where that is not possible."""
    if os.geteuid() != 0 or not (MEMORY_CGROUP / "memory.limit_in_bytes").exists():
        yield None
        return
    group = MEMORY_CGROUP / f"sllm-bench-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(size_bytes))
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()  # its members have ended


def _figures(latencies: Sequence[Latency]) -> dict[str, float]:
    """Return milliseconds, over all loads and over those that had to read (`cold`), as far as one can tell."""
    everything = [latency.seconds * 1e3 for latency in latencies]
    cold = [latency.seconds * 1e3 for latency in latencies if not latency.hit]
    return {
        "mean_ms": statistics.mean(everything),
        "p99_ms": _percentile(everything, 99),
        "cold_p50_ms": statistics.median(cold),
        "cold_p99_ms": _percentile(cold, 99),
        "hit_share": 1 - len(cold) / len(everything),
    }


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _show(title: str, figures: dict[str, dict[str, float]]) -> None:
    rows = [[name, *each.values()] for name, each in figures.items()]
    table(title, ["loader", "mean, ms", "p99, ms", "reads: p50", "reads: p99", "hits in the pool"], rows)
