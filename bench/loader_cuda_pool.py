"""From a node's pool to a GPU, as an engine host copies: DRAM -> GPU as a share of what the link can carry.

    PYTHONPATH=. python bench/loader_cuda_pool.py --gb 8      # needs torch, xxhash and a GPU only. Not yet run on one.

A process holds a filled pool, as the store process does; each measurement is a fork of it that gets a lease, makes a
CUDA context, and then, on the clock, maps the lease and brings every byte to the GPU: from memory that is registered
read-only meanwhile, by way of a little registered memory, or just so. The limit, copies of one large page-locked
buffer, is measured in the same rounds. What has arrived is compared, after the clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from sllm.core.grant import POOL_BLOCK_BYTES, Extent, Grant, chunks_in
from sllm.core.runtime_layout import CHECKPOINT, ENGINE, ENGINE_VERSION
from sllm.engine import device
from sllm.engine.feed import FeedReader
from sllm.engine.weights import Weights
from sllm.loader import save
from sllm.loader.folder import read_manifest
from sllm.loader.memory import cuda
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.space import map_extents, populate
from sllm.loader.pipeline import copy_in_turn

LINK = "link"
REFUSED = float("inf")
DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
GPU = torch.device("cuda", 0)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A runtime layout that lies whole in a pool, in two pieces."""

    pool: SharedPool
    folder: Path
    extents: tuple[Extent, ...]
    size_bytes: int
    total: int  # the sum of its 64-bit words, as the GPU counts it


class Refused:
    """Stands for a registration that CUDA refuses."""

    def wait(self, end: int) -> bool:
        return False


def written(size_bytes: int, folder: Path) -> int:
    """Save a runtime layout of random words; return their sum."""
    words = torch.randint(-(1 << 62), 1 << 62, (size_bytes // 8,), dtype=torch.int64)
    save({"w": words}, folder, layout="runtime", key={CHECKPOINT: "random", ENGINE: "bench", ENGINE_VERSION: "1"})
    return int(words.sum())


def filled(size_bytes: int, folder: Path) -> Filled:
    total = in_fork(partial(written, size_bytes, folder))  # no thread of torch here: forks could not use theirs
    partition = read_manifest(folder).partitions[0]
    room = -(-partition.size_bytes // (2 * POOL_BLOCK_BYTES)) * POOL_BLOCK_BYTES
    pool = SharedPool.create(2 * room, hugepages=True)
    pool.prefault(lock=False, stopped=threading.Event())
    # The second piece first: a pool that was in use for a while has seldom room in one.
    extents = (Extent(room, room), Extent(0, room))
    with (folder / partition.file).open("rb", buffering=0) as source:
        for extent in extents:
            view, done = pool.view(*extent), 0
            while done < len(view) and (count := source.readinto(view[done:])):
                done += count
    return Filled(pool=pool, folder=folder, extents=extents, size_bytes=partition.size_bytes, total=total)


def opened(given: Filled) -> Weights:
    """Map a lease, as `open_weights` does for a GPU's host."""
    manifest = read_manifest(given.folder)
    size_bytes, chunk_bytes = manifest.partitions[0].size_bytes, manifest.chunk_bytes
    chunks = chunks_in(size_bytes, chunk_bytes)
    grant = Grant(
        digest=manifest.digest,
        partition=0,
        generation=1,
        size_bytes=size_bytes,
        chunk_bytes=chunk_bytes,
        extents=given.extents,
        slots=chunks,
        ready_chunks=chunks,
    )
    lease = given.pool.lease(given.extents)
    memory = map_extents(lease, given.extents, shared=True, writable=False)
    os.close(lease)
    populate(memory, write=False)
    feed = FeedReader(grant, socket.socketpair()[0])
    feed.follow(lambda share: None)
    return Weights(manifest=manifest, partition=0, memory=memory, feed=feed, is_shared=True, slots=chunks)


def link(given: Filled) -> float:
    """Return the seconds that as many bytes take from page-locked memory of CUDA's own."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=GPU)
    target.copy_(source)  # the first copy makes streams
    torch.cuda.synchronize()
    began = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * given.size_bytes / source.nbytes


def registered(weights: Weights) -> torch.Tensor:
    with device.registered(weights) as registration:
        assert registration is not None
        return device.on_device(weights, registration, GPU)


def staged(weights: Weights) -> torch.Tensor:
    refused: Any = Refused()
    return device.on_device(weights, refused, GPU)


def unregistered(weights: Weights) -> torch.Tensor:
    assert weights.memory is not None
    target, step = cuda.arena(weights.size_bytes, GPU), weights.manifest.chunk_bytes
    view = weights.memory.view(0, weights.size_bytes)
    copy_in_turn(((view[at : at + step], at) for at in range(0, len(view), step)), cuda.CudaCopier(target, GPU))
    return target


def copying(load: Callable[[Weights], torch.Tensor], given: Filled) -> float:
    """Return the seconds from a lease to all bytes on the GPU."""
    torch.zeros(1 << 28, device=GPU).add_(1)  # a context, and kernels
    torch.cuda.synchronize()
    began = time.perf_counter()
    target = load(opened(given))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if int(target[: given.size_bytes // 8 * 8].view(torch.int64).sum()) != given.total:
        raise SystemExit("the GPU has other bytes than the pool")
    return seconds


def registering(given: Filled) -> float:
    """Return the seconds that registering takes alone, REFUSED if CUDA does not."""
    torch.zeros(1, device=GPU)
    weights = opened(given)
    assert weights.memory is not None
    began = time.perf_counter()
    with device.registered(weights) as registration:
        known = registration is not None and registration.wait(weights.memory.size_bytes)
    return time.perf_counter() - began if known else REFUSED


def unregistering(given: Filled) -> float:
    """Return the seconds that it takes to let registered memory go."""
    torch.zeros(1, device=GPU)
    weights = opened(given)
    assert weights.memory is not None
    with device.registered(weights) as registration:
        known = registration is not None and registration.wait(weights.memory.size_bytes)
    began = time.perf_counter()
    weights.release()
    return time.perf_counter() - began if known else REFUSED


TURNS: dict[str, Callable[[Filled], float]] = {
    LINK: link,
    **{load.__name__: partial(copying, load) for load in (registered, staged, unregistered)},
    "registering": registering,
    "unregistering": unregistering,
}


def in_fork(work: Callable[[], T]) -> T:
    """Run in a process of its own: contexts, registrations and caches would help the next measurement."""
    context = multiprocessing.get_context("fork")  # nothing is pickled on the way there: the fork has the pool
    results: multiprocessing.SimpleQueue[T] = context.SimpleQueue()
    process = context.Process(target=lambda: results.put(work()))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("a measurement failed")
    return results.get()


def report(given: Filled, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Print a line for each turn: median seconds, GB/s, and the median share of the link's in the same round."""
    found: dict[str, Any] = {
        "gpu": in_fork(torch.cuda.get_device_name),
        "driver": subprocess.run(DRIVER, capture_output=True, text=True, check=True).stdout.strip(),
        "torch": torch.__version__,
        "size_bytes": given.size_bytes,
        "huge_pages": given.pool.huge,
        "turns": {},
    }
    for name, taken in seconds.items():
        if REFUSED in taken:
            print(f"{name:14} CUDA refuses")
            continue
        share = statistics.median(limit / own for limit, own in zip(seconds[LINK], taken, strict=True))
        median_s = statistics.median(taken)
        print(f"{name:14} {median_s:7.3f} s {given.size_bytes / median_s / 1e9:6.1f} GB/s {share:5.2f} of the link")
        found["turns"][name] = {"seconds": taken, "share": share}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8, help="how much to copy, in 1e9 bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write what was found")
    given = parser.parse_args()
    if not in_fork(torch.cuda.is_available):  # once CUDA was asked anything here, forks could not use it
        raise SystemExit("there is no GPU here that torch can use")
    with tempfile.TemporaryDirectory(prefix="sllm-bench-") as parent:
        content = filled(int(given.gb * 1e9) // 8 * 8, Path(parent) / "runtime")
        seconds: dict[str, list[float]] = {name: [] for name in TURNS}
        for _ in range(given.rounds):
            for name, turn in TURNS.items():
                seconds[name].append(in_fork(partial(turn, content)))
        found = report(content, seconds)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
