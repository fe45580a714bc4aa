"""SSD -> memory -> device: the tiers work at once, a bounded number of chunks in each.

Threads read and verify chunks (reading.py). For a device one more thread copies chunk i out while chunk i + 1 is being
read: through a ring, so that staging memory is small, and a checkpoint larger than it streams through.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from sllm.errors import Cancelled, SllmError
from sllm.loader.arrangement import Arrangement, Part
from sllm.loader.memory.base import DeviceCopier
from sllm.loader.reading import ChunkReader
from sllm.loader.storage.base import PartitionBytes

COPIES_UNDER_WAY = 4  # per device: one is copied, the next ones wait in its stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """How a load is watched and stopped. `progress(done, total)` counts bytes where they are to be, and is called from
    the load's threads, one call at a time; `cancelled` is asked at each chunk; `deadline` is of time.monotonic()."""

    verify: bool = True
    progress: Callable[[int, int], None] | None = None
    cancelled: Callable[[], bool] = lambda: False
    deadline: float | None = None


class Pipeline:
    """Loads all parts of an arrangement, one after the other, in threads of its own.

    `memory` is where the bytes go; with a `copier` it is the ring that they go through, of `slots` chunks.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        sources: Sequence[PartitionBytes],
        memory: memoryview,
        control: Control,
        *,
        copier: DeviceCopier | None = None,
        slots: int = 0,
    ) -> None:
        self._arrangement = arrangement
        self._sources = sources
        self._memory = memory
        self._control = control
        self._copier = copier
        self._slots = slots
        self._guard = threading.Lock()
        self._began = False
        self._stopped = threading.Event()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._interrupt: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> None:
        """Begin to load. Whoever calls this must call `wait`."""
        self._thread.start()

    def wait(self) -> None:
        """Return when all is loaded. No thread touches the memory or the sources then, whatever happened.

        Raises what ChunkReader and the copier raise; the first error ends the load.
        """
        while not self._ended.is_set():
            try:
                # Not the thread's `join`: interrupted, Python 3.11 takes the thread for dead while it runs.
                self._ended.wait()
            except BaseException as interrupt:  # Ctrl-C, as often as it comes: no thread may outlive the memory
                self.stop()
                self._interrupt = interrupt
        error, self._interrupt, self._error = self._interrupt or self._error, None, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # no cycle through this frame: it would keep memory

    def stop(self) -> None:
        """End the load at the next chunk, or before it begins; `wait` then raises Cancelled."""
        with self._guard:
            self._stopped.set()
            if not self._began:
                self._error = Cancelled("the load was cancelled")
                self._ended.set()

    def _begin(self) -> bool:
        with self._guard:
            self._began = not self._stopped.is_set()
            return self._began

    def _run(self) -> None:
        if not self._begin():
            return
        try:
            for part, source in zip(self._arrangement.parts, self._sources, strict=True):
                self._load(part, source)
        except BaseException as error:
            self._error = error
        finally:
            if self._copier is not None:
                self._copier.close()
            self._ended.set()

    def _load(self, part: Part, source: PartitionBytes) -> None:
        if self._copier is None:
            self._reader(part, source, slots=None, on_ready=partial(self._report, part)).read()
            return
        reader = self._reader(part, source, slots=self._slots, on_ready=lambda ready: None)
        reader.start()
        try:
            self._copy_out(part, reader, self._copier)
        except BaseException:
            reader.cancel()
            with contextlib.suppress(SllmError):
                reader.wait()
            raise
        reader.wait()

    def _reader(
        self, part: Part, source: PartitionBytes, *, slots: int | None, on_ready: Callable[[int], None]
    ) -> ChunkReader:
        return ChunkReader(
            source,
            chunk_bytes=self._arrangement.chunk_bytes,
            hashes=part.partition.chunks if self._control.verify else None,
            place=partial(self._place, part),
            slots=slots,
            on_ready=on_ready,
            cancelled=lambda: self._stopped.is_set() or self._control.cancelled(),
            deadline=self._control.deadline,
        )

    def _place(self, part: Part, chunk: int) -> memoryview:
        chunk_bytes = self._arrangement.chunk_bytes
        begin = part.start + chunk * chunk_bytes if self._copier is None else chunk % self._slots * chunk_bytes
        return self._memory[begin : begin + chunk_bytes]

    def _copy_out(self, part: Part, reader: ChunkReader, copier: DeviceCopier) -> None:
        """Copy each chunk as it becomes ready, and let its slot go when the copy has ended."""

        def ended(chunks: int) -> None:
            reader.taken(chunks)
            self._report(part, chunks)

        most = max(1, min(COPIES_UNDER_WAY, self._slots - 1))
        copy_in_turn(self._arriving(part, reader), copier, most=most, ended=ended)

    def _arriving(self, part: Part, reader: ChunkReader) -> Iterator[tuple[memoryview, int]]:
        """Yield each chunk when it is ready, and where it goes; end early if the reader fails: its `wait` says why."""
        for chunk in range(reader.chunks):
            if not reader.wait_for(chunk + 1):
                return
            offset = chunk * self._arrangement.chunk_bytes
            length = min(self._arrangement.chunk_bytes, part.partition.size_bytes - offset)
            yield self._place(part, chunk)[:length], part.start + offset

    def _report(self, part: Part, chunks: int) -> None:
        if self._control.progress is not None:
            done = part.start + min(chunks * self._arrangement.chunk_bytes, part.partition.size_bytes)
            self._control.progress(done, self._arrangement.size_bytes)


def copy_in_turn(
    pieces: Iterable[tuple[memoryview, int]],
    copier: DeviceCopier,
    *,
    most: int = COPIES_UNDER_WAY,
    ended: Callable[[int], None] = lambda copies: None,
) -> None:
    """Copy pieces (bytes, and where they go) as they come, at most `most` at a time. `ended` gets, after each copy, how
    many have ended. Raises what `copier` raises, which its owner then closes."""
    begun = done = 0
    for source, offset in pieces:
        copier.begin(source, offset)
        begun += 1
        if begun - done == most:
            copier.end_oldest()
            ended(done := done + 1)
    while done < begun:
        copier.end_oldest()
        ended(done := done + 1)
