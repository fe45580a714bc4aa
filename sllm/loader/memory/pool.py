"""Memory that loads of the library fill: a pool made once and used again, or a fresh arena per load.

Memory that is already present is what makes loading fast: the first touch of a page costs more CPU than reading it
from a disk.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from sllm.core.grant import Extent
from sllm.errors import CapacityExceeded, Conflict, InvalidArgument
from sllm.loader.format import PAGE_BYTES, round_up
from sllm.loader.memory import space
from sllm.loader.memory.extents import FreeSpace
from sllm.loader.memory.space import Buffer, Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Memory for one load. It goes back when nobody has a view on `buffer` any more, or by `release`, for a load that
    failed: tracebacks hold views, and an error that somebody keeps must not keep memory."""

    buffer: Buffer = field(repr=False)
    release: Callable[[], object]


class Pool:
    """`size_bytes` of memory (rounded up to pages) that loads reuse: present from the start, and locked if allowed.

    A load takes one contiguous piece, and the piece is free again when the last tensor (or view of one) on it is gone.
    A checkpoint that does not fit is refused with CapacityExceeded: reading it into fresh memory behind the caller's
    back would cost several times as much (`pool=None` asks for that). On a GPU the pool is only passed through, so any
    size will do. Threads may share a pool.

    Raises CapacityExceeded if the machine has not that much memory to give.
    """

    def __init__(self, size_bytes: int) -> None:
        if size_bytes <= 0:
            raise InvalidArgument(f"a pool of {size_bytes} bytes holds nothing")
        self.size_bytes = round_up(size_bytes, PAGE_BYTES)
        self._space: Space | None = new_memory(self.size_bytes, present=True)
        self.unlocked_because = _lock(self._space)
        whole = [Extent(0, self.size_bytes)]
        self._free = FreeSpace(whole, PAGE_BYTES)
        self._guard = threading.Lock()
        # Given back by finalizers, which may run in the middle of anything, this pool's own methods too: a deque needs
        # no lock for `append`.
        self._returned: deque[Extent] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Pool({self.size_bytes}, used_bytes={self.used_bytes})"

    @property
    def used_bytes(self) -> int:
        """What tensors that still live hold, in whole pages."""
        with self._guard:
            self._collect()
            return self.size_bytes - self._free.size_bytes

    @property
    def largest_bytes(self) -> int:
        """The largest checkpoint that would fit now."""
        with self._guard:
            self._collect()
            return self._free.largest_bytes

    @property
    def memory(self) -> Space:
        """The whole pool, for a device that must register it. Raises Conflict if it is closed."""
        if self._space is None:
            raise Conflict("the pool is closed")
        return self._space

    def allocate(self, size_bytes: int) -> Allocation:
        """Return memory of `size_bytes`, beginning at a page: with any content. Whoever has a view on it keeps it.

        Raises CapacityExceeded, Conflict if the pool is closed.
        """
        memory, length = self.memory, round_up(size_bytes, PAGE_BYTES)
        if length == 0:
            return Allocation(buffer=(ctypes.c_ubyte * 0)(), release=lambda: None)
        with self._guard:
            self._collect()
            piece = self._free.take_piece(length)
            if piece is None:
                raise self._exhausted(length)
        buffer = (ctypes.c_ubyte * size_bytes).from_address(memory.address + piece.offset)
        # The finalizer has the memory too: memory of a closed pool stays while somebody uses it.
        give_back = weakref.finalize(buffer, _give_back, self._returned, piece, memory)
        give_back.atexit = False
        return Allocation(buffer=buffer, release=give_back)

    def close(self) -> None:
        """Give the memory back to the machine, as soon as no tensor needs it. Nothing can be loaded into it then."""
        self._space = None

    def _collect(self) -> None:
        while self._returned:
            self._free.give_back(self._returned.popleft())

    def _exhausted(self, wanted: int) -> CapacityExceeded:
        free, largest = self._free.size_bytes, self._free.largest_bytes
        return CapacityExceeded(
            f"{wanted} bytes are needed; of the pool's {self.size_bytes}, {free} are free, {largest} in one piece",
            hint="let go of tensors loaded before, make a larger Pool, or load without one",
        )


def fresh(size_bytes: int) -> Allocation:
    """Return memory of its own, as `new_memory`."""
    return Allocation(buffer=new_memory(size_bytes).buffer, release=lambda: None)


def new_memory(size_bytes: int, *, present: bool = False) -> Space:
    """Return memory of huge pages where possible; it comes as it is filled, or is all `present`.

    Raises CapacityExceeded if the machine has not that much to give.
    """
    try:
        memory = space.anonymous(size_bytes)
        if present:
            space.populate(memory, write=True, threads=2)
    except OSError as error:
        raise CapacityExceeded(f"the machine has not {size_bytes} bytes of memory to give") from error
    return memory


def _give_back(returned: deque[Extent], piece: Extent, memory: Space) -> None:
    returned.append(piece)


def _lock(memory: Space) -> str:
    try:
        space.lock(memory)
    except OSError as error:
        return str(error)
    return ""
