"""A partition in memory, whose disk misbehaves as told. For tests, and wherever a load must be held at a chunk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping


class FakeSource:
    """`data` is what the disk holds.

    `most_bytes` makes every read short. `errors` maps an offset to what a read that touches it raises, `hiccups` to
    what only the first one raises. `flips` maps an offset to how many reads see that byte wrong (a bus, the disk);
    `fresh` reads count too. Bytes at the offsets of `stale` are wrong in a cache, past which only `fresh` reads go.
    `gate(offset)` is called before each read, and may block. `reads` lists (offset, bytes) of all reads.
    """

    def __init__(
        self,
        data: bytes,
        *,
        name: str = "partition-000.bin",
        most_bytes: int | None = None,
        errors: Mapping[int, OSError] | None = None,
        hiccups: Mapping[int, OSError] | None = None,
        flips: Mapping[int, int] | None = None,
        stale: Collection[int] = (),
        gate: Callable[[int], None] = lambda offset: None,
    ) -> None:
        self.name = name
        self.size_bytes = len(data)
        self.reads: list[tuple[int, int]] = []
        self.is_closed = False
        self._data = data
        self._most_bytes = most_bytes
        self._errors = dict(errors or {})
        self._hiccups = dict(hiccups or {})
        self._flips = dict(flips or {})
        self._stale = tuple(stale)
        self._gate = gate
        self._lock = threading.Lock()

    def truncate(self, size_bytes: int) -> None:
        """Lose the end of the data, unnoticed by `size_bytes`."""
        self._data = self._data[:size_bytes]

    def read_into(self, view: memoryview, offset: int, *, fresh: bool = False) -> int:
        self._gate(offset)
        found = bytearray(self._data[offset : offset + min(len(view), self._most_bytes or len(view))])
        with self._lock:
            self.reads.append((offset, len(found)))
            self._fail(offset, offset + len(found))
            self._flip(found, offset, fresh)
        view[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self.is_closed = True

    def _fail(self, begin: int, end: int) -> None:
        for place, error in (*self._errors.items(), *self._hiccups.items()):
            if begin <= place < end:
                self._hiccups.pop(place, None)
                raise error

    def _flip(self, found: bytearray, offset: int, fresh: bool) -> None:
        for place in () if fresh else self._stale:
            if offset <= place < offset + len(found):
                found[place - offset] ^= 0xFF
        for place, left in self._flips.items():
            if left > 0 and offset <= place < offset + len(found):
                found[place - offset] ^= 0xFF
                self._flips[place] = left - 1
