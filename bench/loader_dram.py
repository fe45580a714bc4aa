"""A checkpoint that lies in a node's DRAM pool, used by another process: from its lease to every tensor usable.

The pool, its leases, the mapping and the tensors are the product's code (SharedPool, map_extents, tensors_on); the
processes are the bench's own: one holds the pool and has filled it by plain reads, and each measurement is another one
that gets a lease and does what an engine host does: read the manifest, map the extents, make the tensors. Not measured:
the store process' answer, and the pages that an engine host maps beside its start. Reading all of it once, and once
again, says what those page faults cost. safetensors' load_file from a warm page cache is the contrast.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from common import table
from loader_cases import WARM_UP, write
from loader_checkpoints import Tensors, size_of
from loader_device import huge_pages, plain_folder
from loader_measure import MeasurementFailed, bytes_of, drop_cache, in_fork
from loader_peers import load_file, partitions, pool_bytes
from loader_report import Goal, Result

from sllm.core.grant import POOL_BLOCK_BYTES, Extent
from sllm.loader import format as checkpoint_format
from sllm.loader.memory import space
from sllm.loader.memory.shared import SharedPool
from sllm.loader.views import bytes_of as memory_as_tensor
from sllm.loader.views import tensors_on

SMALL, HUGE, MAPPED = "pool of 4 KiB pages", "pool of huge pages", "load_file, page cache warm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Seconds until all tensors are there, then for one pass over their bytes, then for a second one."""

    ready_s: float
    first_pass_s: float
    second_pass_s: float
    checksum: int


def run(rounds: int, *, quick: bool) -> Result:
    kind = "tiny" if quick else "5gb"
    with plain_folder() as device:
        in_fork(lambda: write(kind, {"safetensors", "sllm"}, device.folder))
        mapped = partial(
            _use, load_file(device.folder / "safetensors"), load_file(device.folder / WARM_UP / "safetensors")
        )
        uses = {MAPPED: _rounds(mapped, rounds + 1)[1:]}  # the first one warms the page cache
        uses[SMALL] = in_fork(partial(_from_pool, device.folder / "sllm", rounds, huge=False))
        drop_cache(device.folder)  # huge pages need the room
        with huge_pages(pool_bytes(device.folder / "sllm"), reserve=not quick) as available:
            if available:
                uses[HUGE] = in_fork(partial(_from_pool, device.folder / "sllm", rounds, huge=True))
    if len({use.checksum for each in uses.values() for use in each}) != 1:
        raise MeasurementFailed("the bytes in the pool are not those of the checkpoint")
    goals = [_goal(name, uses[name]) for name in (SMALL, HUGE) if name in uses]
    title = f"DRAM tier, {size_of(kind) / 1e9:.1f} GB: lease -> every tensor usable (the product's pool and mapping)"
    _show(title, uses)
    left_out = {} if HUGE in uses else {HUGE: "none are reserved (needs root and free memory)"}
    facts = {"quick": quick, "uses": {name: _figures(each) for name, each in uses.items()}}
    return Result(case="dram", title=title, size_bytes=size_of(kind), goals=goals, left_out=left_out, facts=facts)


def _from_pool(folder: Path, rounds: int, *, huge: bool) -> list[Use]:
    """Fill a pool and use it; runs in the process that owns it."""
    (file,) = partitions(folder)
    size_bytes = pool_bytes(folder)
    pool = SharedPool.create(size_bytes, hugepages=huge)
    if pool.huge != huge:
        raise MeasurementFailed("the pool has not the pages that it should have")
    with open(file, "rb", buffering=0) as source:
        view, done = pool.view(0, size_bytes), 0
        while count := source.readinto(view[done : done + (64 << 20)]):
            done += count
    half = size_bytes // 2 // POOL_BLOCK_BYTES * POOL_BLOCK_BYTES
    # Two extents: a pool that was in use for a while has seldom room in one piece.
    extents = [extent for extent in (Extent(0, half), Extent(half, size_bytes - half)) if extent.size_bytes]
    return _rounds(lambda: _leased(pool, folder, extents), rounds)


def _leased(pool: SharedPool, folder: Path, extents: Sequence[Extent]) -> Use:
    lease = pool.lease(extents)
    try:
        warm_up = partial(_tensors, folder.parent / WARM_UP / "sllm", lease, extents)
        return _use(partial(_tensors, folder, lease, extents), warm_up)
    finally:
        os.close(lease)


def _rounds(use: Callable[[], Use], rounds: int) -> list[Use]:
    return [in_fork(use) for _ in range(rounds)]


def _tensors(folder: Path, lease: int, extents: Sequence[Extent]) -> Tensors:
    """What an engine host does with its grant."""
    manifest = checkpoint_format.parse((folder / checkpoint_format.MANIFEST).read_bytes())
    memory = space.map_extents(lease, extents)
    return tensors_on(memory_as_tensor(memory.buffer), manifest.tensors)


def _use(load: Callable[[], Tensors], warm_up: Callable[[], Tensors]) -> Use:
    """Time a load and two passes. `warm_up` is a load off the clock: engine hosts are forks of a warm process."""
    warm_up()
    started = time.perf_counter()
    tensors = load()
    ready_s = time.perf_counter() - started
    first, checksum = _pass(tensors)
    second, _ = _pass(tensors)
    return Use(ready_s=ready_s, first_pass_s=first, second_pass_s=second, checksum=checksum)


def _pass(tensors: Tensors) -> tuple[float, int]:
    started = time.perf_counter()
    checksum = sum(int(bytes_of(tensor).view(np.uint64).sum(dtype=np.uint64)) for tensor in tensors.values())
    return time.perf_counter() - started, checksum


def _goal(name: str, uses: Sequence[Use]) -> Goal:
    value = median(use.ready_s for use in uses) * 1e3
    return Goal(what=f"{name}: ms", target=5, value=value, at_least=False)


def _figures(uses: Sequence[Use]) -> dict[str, float]:
    return {
        "ready_ms": median(use.ready_s for use in uses) * 1e3,
        "first_pass_s": median(use.first_pass_s for use in uses),
        "second_pass_s": median(use.second_pass_s for use in uses),
    }


def _show(title: str, uses: dict[str, list[Use]]) -> None:
    rows = [[name, *_figures(each).values(), len(each)] for name, each in uses.items()]
    table(title, ["from", "usable, ms", "first pass, s", "second pass, s", "n"], rows)
