"""What each idea of the paper's loader is worth, one on top of the other (OSDI'24 §7.2, figure "loading breakdown").

The steps are readers of the bench's own, each a few lines, because the product has only the last of them: they say
what an idea is worth, not how fast the product is (the other cases do), and nothing is verified on the clock. Pool and
target are the product's memory (sllm.loader.memory.space).

Without a GPU the device is memory that was filled before the clock, and the copy to it a memcpy. Each step reads the
same partition file, cold, in a process of its own, and its bytes are compared after the clock.
"""

from __future__ import annotations

import itertools
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from common import table
from loader_cases import write
from loader_checkpoints import size_of
from loader_device import Device, plain_folder, ram_device
from loader_measure import Memory, Sample, drop_cache, in_fork, prewarm, stopwatch
from loader_peers import partitions
from loader_report import Result, Samples, ratio

CHUNK_BYTES = 8 << 20
THREADS = 4
# What a step was worth to the authors, over the step before it.
PAPER = {"+ bulk": 1.2, "+ direct I/O": 2.1, "+ threads": 2.3, "+ pinned pool": 1.4, "+ pipeline": 1.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One load: a file of `size_bytes`, where its tensors lie, the device's memory, and a pool (empty: none)."""

    file: Path
    size_bytes: int
    tensors: list[tuple[int, int]]
    device: Memory
    pool: memoryview

    def chunks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.size_bytes, CHUNK_BYTES):
            yield start, min(start + CHUNK_BYTES, self.size_bytes)

    def copy(self, memory: memoryview, start: int, end: int) -> None:
        """Copy to the device; numpy releases the GIL."""
        self.device[start:end] = np.frombuffer(memory[start:end], np.uint8)


def by_tensor(stage: Stage) -> None:
    """One buffered read per tensor, into memory of its own."""
    with open(stage.file, "rb", buffering=0) as file:
        for offset, size in stage.tensors:
            memory = memoryview(bytearray(size))
            _read(file.fileno(), memory, offset)
            stage.device[offset : offset + size] = np.frombuffer(memory, np.uint8)


def bulk(stage: Stage) -> None:
    """Large buffered reads in order."""
    _read_all(stage, _fresh(stage.size_bytes), flags=0, threads=1)


def direct(stage: Stage) -> None:
    """The same past the page cache."""
    _read_all(stage, _fresh(stage.size_bytes), flags=os.O_DIRECT, threads=1)


def threads(stage: Stage) -> None:
    _read_all(stage, _fresh(stage.size_bytes), flags=os.O_DIRECT, threads=THREADS)


def pinned(stage: Stage) -> None:
    """The same into memory that outlives the load."""
    _read_all(stage, stage.pool, flags=os.O_DIRECT, threads=THREADS)


def pipeline(stage: Stage) -> None:
    """The copy of a chunk to the device beside the reads of the next."""
    ready: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    readers = _start_readers(stage, stage.pool, os.O_DIRECT, THREADS, lambda *chunk: ready.put(chunk))
    for _ in stage.chunks():
        stage.copy(stage.pool, *ready.get())
    for reader in readers:
        reader.join()


STEPS: dict[str, Callable[[Stage], None]] = {
    "read by tensor": by_tensor,
    "+ bulk": bulk,
    "+ direct I/O": direct,
    "+ threads": threads,
    "+ pinned pool": pinned,
    "+ pipeline": pipeline,
}


def _fresh(size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _read_all(stage: Stage, memory: memoryview, *, flags: int, threads: int) -> None:
    for reader in _start_readers(stage, memory, flags, threads, lambda start, end: None):
        reader.join()
    stage.copy(memory, 0, stage.size_bytes)


def _start_readers(
    stage: Stage, memory: memoryview, flags: int, threads: int, done: Callable[[int, int], None]
) -> list[threading.Thread]:
    """Read all chunks in threads that take the next one each; `done(start, end)` is called in them."""
    chunks = list(stage.chunks())
    numbers = itertools.count()  # its `next` is atomic

    def work() -> None:
        descriptor = os.open(stage.file, os.O_RDONLY | flags)
        while (number := next(numbers)) < len(chunks):
            start, end = chunks[number]
            _read(descriptor, memory[start:end], start)
            done(start, end)
        os.close(descriptor)

    readers = [threading.Thread(target=work) for _ in range(threads)]
    for reader in readers:
        reader.start()
    return readers


def _read(descriptor: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            raise EOFError(f"the file ends at {offset + done}")
        done += count


# --- running --------------------------------------------------------------------------------


def run(rounds: int, *, quick: bool) -> Result:
    kind = "tiny" if quick else "1b"
    with ExitStack() as stack:
        device = stack.enter_context(plain_folder() if quick else ram_device(size_of(kind) * 2))
        in_fork(lambda: write(kind, {"safetensors", "sllm"}, device.folder))
        samples: Samples = {name: [] for name in STEPS}
        for _, (name, step) in itertools.product(range(rounds), STEPS.items()):
            samples[name].append(in_fork(partial(_measure, step, device)))
    _check_equal(samples)
    factors = _factors(samples)
    _show(factors)
    return Result(
        case="breakdown",
        title="breakdown: 1.2 GB, cold, step by step, by readers of the bench's own",
        size_bytes=size_of(kind),
        samples=samples,
        facts={"disk": device.name, "quick": quick, "factors": factors, "paper": PAPER},
    )


def _measure(step: Callable[[Stage], None], device: Device) -> Sample:
    from sllm.loader import format as checkpoint_format
    from sllm.loader.memory import space

    folder = device.folder / "sllm"
    (file,) = partitions(folder)
    manifest = checkpoint_format.parse((folder / checkpoint_format.MANIFEST).read_bytes())
    size_bytes = file.stat().st_size
    target = space.anonymous(size_bytes)
    pool = space.anonymous(size_bytes if step in (pinned, pipeline) else 0)
    for each in (target, pool):
        space.populate(each, write=True)
    space.lock(pool)
    stage = Stage(
        file=file,
        size_bytes=size_bytes,
        tensors=sorted((t.offset, t.size_bytes) for t in manifest.tensors.values()),
        device=np.frombuffer(target.view(), np.uint8),
        pool=pool.view(),
    )
    prewarm(size_bytes)
    drop_cache(folder)
    with stopwatch() as watch:
        step(stage)
    return watch.sample(digest=_digest(stage))


def _digest(stage: Stage) -> str:
    """Hash the tensors' bytes only: reading by tensor skips the padding."""
    content = xxhash.xxh3_128()
    for offset, size in stage.tensors:
        content.update(stage.device[offset : offset + size])
    return content.hexdigest()


def _check_equal(samples: Samples) -> None:
    if len({sample.digest for each in samples.values() for sample in each}) != 1:
        raise SystemExit("the steps did not load the same bytes")


def _factors(samples: Samples) -> dict[str, float]:
    """Return what each step is worth over the one before it."""
    return {after: ratio(samples, before, after) for before, after in itertools.pairwise(STEPS)}


def _show(factors: dict[str, float]) -> None:
    rows = [[name, factors[name], PAPER[name]] for name in factors]
    table("breakdown: times faster than the step before", ["step", "here", "paper"], rows)
