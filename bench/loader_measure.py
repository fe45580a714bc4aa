"""One measurement: a forked process, memory made cheap first, a clock that stops when every page was touched.

What makes naive figures worthless, and the remedy that is taken here:

- What a loader leaves in its process (pages, threads, caches) helps the next one: each measurement has its own fork.
- Memory that was not used for a while is dear in a virtual machine (the host took it back: up to 2.4 s per GB) and
  cheap just after somebody freed it: more than is needed is touched and freed before each measurement.
- A loader that maps a file has read nothing yet: every page of every tensor is touched before the clock stops.
- A loader that returns the wrong bytes is fast: contents are hashed, after the clock.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import xxhash
from loader_checkpoints import Tensors

PAGE_BYTES = 4096
PREWARM = 2.2  # of the checkpoint's size

Memory: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """`cpu_s` counts all threads of the process; `digest` names the content; `tail_s` is what a load itself says took
    place after its last byte had come."""

    seconds: float
    cpu_s: float
    digest: str = ""
    tail_s: float = 0.0


class MeasurementFailed(Exception):
    """The measured process failed; the text says how."""


def in_fork(work: Callable[[], T]) -> T:
    """Return what `work` returns in a forked process. Raises MeasurementFailed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _run_and_leave(work, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not answer:
        raise MeasurementFailed(f"the process ended with status {status}")
    done, value = pickle.loads(answer)
    if not done:
        raise MeasurementFailed(value)
    result: T = value
    return result


def _run_and_leave(work: Callable[[], Any], writer: int) -> None:
    try:
        answer: tuple[bool, Any] = (True, work())
    except BaseException as error:  # whatever it is, the parent says it
        answer = (False, f"{type(error).__name__}: {error}")
    with open(writer, "wb") as pipe:
        pipe.write(pickle.dumps(answer))
    os._exit(0)  # no finalizers: some peers' take seconds


class Watch:
    """The time and the CPU seconds of a block; see `stopwatch`."""

    def __init__(self) -> None:
        self._cpu_s = _cpu_s()
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._started
        self._cpu_s = _cpu_s() - self._cpu_s

    def sample(self, *, digest: str = "", tail_s: float = 0.0) -> Sample:
        return Sample(seconds=self._seconds, cpu_s=self._cpu_s, digest=digest, tail_s=tail_s)


@contextmanager
def stopwatch() -> Iterator[Watch]:
    watch = Watch()
    yield watch
    watch.stop()


def timed(load: Callable[[], Tensors]) -> Sample:
    """Measure one load, in this process."""
    with stopwatch() as watch:
        tensors = load()
        touch(tensors)
    return watch.sample(digest=digest(tensors), tail_s=getattr(load, "tail_s", 0.0))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def touch(tensors: Tensors) -> int:
    """Read one byte of every page that holds a part of a tensor; return their sum. All tensors are contiguous.

    Neighbours are read in one go, so that a loader is not charged for a Python loop of the bench.
    """
    spans = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors.values() if tensor.nbytes)
    return sum(int(_memory(start, end)[::PAGE_BYTES].sum()) for start, end in stretches(spans))


def stretches(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the page-aligned stretches that the spans cover without a whole page between them."""
    first, last = spans[0][0] // PAGE_BYTES, (sum(spans[0]) - 1) // PAGE_BYTES
    for start, size in spans[1:]:
        if start // PAGE_BYTES > last + 1:
            yield first * PAGE_BYTES, (last + 1) * PAGE_BYTES
            first = start // PAGE_BYTES
        last = max(last, (start + size - 1) // PAGE_BYTES)
    yield first * PAGE_BYTES, (last + 1) * PAGE_BYTES


def _memory(start: int, end: int) -> Memory:
    pointer = ctypes.cast(start, ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(pointer, shape=(end - start,))


def digest(tensors: Tensors) -> str:
    """Return the xxh3-128 of names, dtypes, shapes and bytes, whatever order they came in."""
    content = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(bytes_of(tensor))
    return content.hexdigest()


def bytes_of(tensor: torch.Tensor) -> Memory:
    """Return a contiguous tensor's bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def prewarm(size_bytes: int) -> None:
    """Touch and free memory, so that whoever allocates next does not pay for the host's having taken it back."""
    with mmap.mmap(-1, max(PAGE_BYTES, int(size_bytes * PREWARM)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(area, np.uint8)[::PAGE_BYTES] = 1


def memory_limits(size_bytes: int = 256 << 20, rounds: int = 5) -> dict[str, float]:
    """Return what one core does with memory that is in no cache, in GB/s: copying it, and hashing it with xxh3-64.

    Loading is bound by these two as much as by the disk, and machines differ by 3x.
    """
    source, target = (np.ones(size_bytes, np.uint8) for _ in range(2))
    copied = max(_gb_per_s(size_bytes, lambda: np.copyto(target, source)) for _ in range(rounds))
    hashed = max(_gb_per_s(size_bytes, lambda: xxhash.xxh3_64_digest(source)) for _ in range(rounds))
    return {"copy_gb_per_s": round(copied, 1), "xxh3_gb_per_s": round(hashed, 1)}


def _gb_per_s(size_bytes: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return size_bytes / 1e9 / (time.perf_counter() - started)


def drop_cache(folder: Path) -> None:
    """Drop the page cache of every file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # what is dirty would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
