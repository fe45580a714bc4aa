"""The threads that read a partition's chunks and verify them.

Plain Python is as fast as C++ or io_uring here: `os.preadv` and xxh3 release the GIL for whole chunks, so that it costs
about 1 µs per chunk. What it does not stand is another busy Python thread in the process: each chunk then waits up to
sys.getswitchinterval() for the GIL.
"""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Callable, Sequence

import xxhash

from sllm.errors import (
    Cancelled,
    CapacityExceeded,
    CheckpointUnreadable,
    ChunkCorrupt,
    DeadlineExceeded,
    PartitionTruncated,
    SllmError,
)
from sllm.loader.storage.base import PartitionBytes

THREADS = 4  # with chunks of 1 to 8 MiB as fast as any disk up to 8.5 GB/s; more gain nothing
# A chunk is read and hashed in pieces: a piece that has just been read is still in the CPU's cache, where xxh3 is three
# times as fast as in memory. Any disk is at its full speed with reads of this size.
PIECE_BYTES = 1 << 20
_NO_MEMORY = {errno.EFAULT, errno.ENOMEM}  # the target's page could not be made present: not the disk's fault


class ChunkReader:
    """Reads all chunks of one source with several threads, in order of their start, and verifies each as it is read.

    `place(chunk)` says where a chunk belongs: a writable view of at least its length (aligned to 4 KiB for O_DIRECT).
    `hashes` are the manifest's (xxh3-64, hexadecimal); None verifies nothing. A chunk that is not what was written is
    read once more, past any cache, before it counts as corrupt; so is what gives an error, before it is unreadable.

    `on_ready(n)` is called whenever n grows: the first n chunks are in place and verified. Calls come one at a time
    from any of the threads, in order, and hold up reading: they must be short.

    While `paused()` is true no chunk is begun; those under way end. It is asked before each chunk, and by who waits
    whenever `look_again` is called.

    In a ring (`slots`) chunk n is read only when chunk n - slots is no longer needed, as `taken` says; `place` then
    gives out slot n % slots.

    The first error stops all threads at their next chunk, and is raised once: ChunkCorrupt, CheckpointUnreadable (the
    disk), PartitionTruncated (it shrank while it was read), CapacityExceeded (no memory behind `place`), Cancelled when
    `cancelled()` is true or `cancel` was called, DeadlineExceeded when time.monotonic() passes `deadline`; or what a
    callback raised. Threads have ended by then, and the memory holds whatever had arrived.
    """

    def __init__(
        self,
        source: PartitionBytes,
        *,
        chunk_bytes: int,
        hashes: Sequence[str] | None,
        place: Callable[[int], memoryview],
        slots: int | None = None,
        threads: int = THREADS,
        on_ready: Callable[[int], None] = lambda ready: None,
        cancelled: Callable[[], bool] = lambda: False,
        paused: Callable[[], bool] = lambda: False,
        deadline: float | None = None,
    ) -> None:
        self.chunks = -(-source.size_bytes // chunk_bytes)
        if hashes is not None and len(hashes) != self.chunks:
            raise ValueError(f"{len(hashes)} hashes for {self.chunks} chunks")
        self._source = source
        self._chunk_bytes = chunk_bytes
        self._hashes = hashes
        self._place = place
        self._slots = self.chunks if slots is None else slots
        self._on_ready = on_ready
        self._cancelled = cancelled
        self._paused = paused
        self._deadline = deadline
        self._next = itertools.count()  # its `next` is atomic
        self._changed = threading.Condition()  # reentrant: `on_ready` may call `taken`
        self._ready = 0
        self._beyond: set[int] = set()  # chunks that are done, while an earlier one is not
        self._taken = 0
        self._error: BaseException | None = None
        self._wanted_threads = min(threads, self.chunks)
        self._threads: list[threading.Thread] = []
        self._begun = 0
        self._ended = 0

    def read(self) -> None:
        """Read everything, and return when it is done. Raises as the class says."""
        self.start()
        self.wait()

    def start(self) -> None:
        """Begin to read. Whoever calls this must call `wait`. Raises RuntimeError if there can be no more threads."""
        try:
            for number in range(self._wanted_threads):
                thread = threading.Thread(target=self._work, name=f"read-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException as error:
            self._fail(error)
            self._join()
            raise

    def wait(self) -> None:
        """Return when everything is read. To be called once. Raises as the class says."""
        self._join()
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback has this frame: the cycle would keep `place`, and the memory behind it

    def wait_for(self, chunks: int) -> bool:
        """Return True once the first `chunks` chunks are ready, False if they never will be (`wait` says why)."""
        with self._changed:
            while self._ready < chunks and self._error is None:
                self._changed.wait()
            return self._ready >= chunks

    def taken(self, chunks: int) -> None:
        """Say that the first `chunks` chunks are no longer needed: their slots may be read into."""
        with self._changed:
            self._taken = max(self._taken, chunks)
            self._changed.notify_all()

    def look_again(self) -> None:
        """Let the threads see, from any thread, that `paused` has changed."""
        with self._changed:
            self._changed.notify_all()

    def cancel(self) -> None:
        """Stop reading, from any thread: `wait` raises Cancelled, unless all was read before."""
        with self._changed:
            if self._ready < self.chunks:
                self._fail(self._called_off())

    def _join(self) -> None:
        """Wait for all threads. An interrupted `Thread.join` of Python 3.11 takes a running thread for dead, so they
        are counted here."""
        while True:
            try:
                with self._changed:
                    self._changed.wait_for(self._have_ended)
                for thread in self._threads:
                    thread.join()
                return
            except BaseException as interrupt:  # Ctrl-C, as often as it comes: no thread may outlive the memory
                self._fail(interrupt)

    def _have_ended(self) -> bool:
        all_begun = self._error is not None or self._begun >= len(self._threads)  # after an error none begins
        return all_begun and self._ended == self._begun

    def _work(self) -> None:
        with self._changed:
            if self._error is not None:
                return
            self._begun += 1
        try:
            while (chunk := next(self._next)) < self.chunks and self._error is None:
                self._check_wanted()
                if self._may_begin(chunk) or self._gets_turn(chunk):
                    self._read(chunk)
                    self._mark(chunk)
        except BaseException as error:
            self._fail(error)
        finally:
            with self._changed:
                self._ended += 1
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def _check_wanted(self) -> None:
        if self._cancelled():
            raise self._called_off()
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise self._too_late()

    def _called_off(self) -> Cancelled:
        return Cancelled(f"the load of {self._source.name} was cancelled")

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._source.name} was not read in time: {self._ready} of {self.chunks} chunks")

    def _may_begin(self, chunk: int) -> bool:
        return chunk < self._taken + self._slots and not self._paused()

    def _gets_turn(self, chunk: int) -> bool:
        """Wait until the chunk's slot is free and nothing is paused; False if another thread failed meanwhile."""
        with self._changed:
            while self._error is None and not self._may_begin(chunk):
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise self._too_late()
                self._changed.wait(left)
            return self._error is None

    def _read(self, chunk: int) -> None:
        offset = chunk * self._chunk_bytes
        with self._place(chunk)[: min(self._chunk_bytes, self._source.size_bytes - offset)] as view:
            if self._is_intact(chunk, self._fill(view, offset, fresh=False)):
                return
            if not self._is_intact(chunk, self._fill(view, offset, fresh=True)):
                raise ChunkCorrupt(
                    f"{self._source.name}: chunk {chunk} (bytes {offset} to {offset + len(view)}) "
                    "is not what was written"
                )

    def _is_intact(self, chunk: int, found: str) -> bool:
        return self._hashes is None or found == self._hashes[chunk]

    def _fill(self, view: memoryview, offset: int, *, fresh: bool) -> str:
        """Read one chunk, and return its hash (of nothing, if none is wanted)."""
        hasher = xxhash.xxh3_64()
        step = len(view) if self._hashes is None else PIECE_BYTES
        for start in range(0, len(view), step):
            piece = view[start : start + step]
            self._fill_piece(piece, offset + start, fresh=fresh)
            if self._hashes is not None:
                hasher.update(piece)
        return hasher.hexdigest()

    def _fill_piece(self, view: memoryview, offset: int, *, fresh: bool) -> None:
        done = 0
        while done < len(view):
            count = self._read_some(view[done:], offset + done, fresh)
            if count == 0:
                raise PartitionTruncated(f"{self._source.name} ended at byte {offset + done} while it was read")
            done += count

    def _read_some(self, view: memoryview, offset: int, fresh: bool) -> int:
        """Read once more after an error: of a server that was away for a moment, say. Who is told that a checkpoint is
        unreadable uses it no more."""
        try:
            return self._source.read_into(view, offset, fresh=fresh)
        except OSError as error:
            if error.errno in _NO_MEMORY:
                raise self._unreadable(error, offset) from error
        try:
            return self._source.read_into(view, offset, fresh=True)
        except OSError as error:
            raise self._unreadable(error, offset) from error

    def _unreadable(self, error: OSError, offset: int) -> SllmError:
        if error.errno in _NO_MEMORY:
            return CapacityExceeded(f"the machine has no memory for byte {offset} of {self._source.name}")
        return CheckpointUnreadable(f"{self._source.name} cannot be read at byte {offset}: {error.strerror}")

    def _mark(self, chunk: int) -> None:
        with self._changed:
            self._beyond.add(chunk)
            before = self._ready
            while self._ready in self._beyond:
                self._beyond.discard(self._ready)
                self._ready += 1
            if self._ready > before and self._error is None:
                self._changed.notify_all()
                self._on_ready(self._ready)
