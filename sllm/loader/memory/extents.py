"""Which bytes of a range are free. Pure; one caller at a time."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from itertools import pairwise

from sllm.core.grant import Extent


class FreeSpace:
    """Extents that nobody has: sorted, disjoint, and no two of them adjacent. All of it goes in whole `unit_bytes`."""

    def __init__(self, extents: Iterable[Extent], unit_bytes: int) -> None:
        self._extents = sorted(extents)
        self._unit_bytes = unit_bytes

    @property
    def extents(self) -> tuple[Extent, ...]:
        return tuple(self._extents)

    @property
    def size_bytes(self) -> int:
        return sum(extent.size_bytes for extent in self._extents)

    @property
    def largest_bytes(self) -> int:
        """What could be had in one piece."""
        return max((extent.size_bytes for extent in self._extents), default=0)

    def take_piece(self, size_bytes: int) -> Extent | None:
        """Take from the smallest extent that is large enough (so that large ones stay whole); None if none is."""
        fitting = [extent for extent in self._extents if extent.size_bytes >= size_bytes]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda extent: (extent.size_bytes, extent.offset))
        piece = Extent(chosen.offset, size_bytes)
        self.remove([piece])
        return piece

    def take(self, size_bytes: int) -> tuple[Extent, ...]:
        """Take one piece if there is one, else of the largest ones until they are enough. Raises ValueError."""
        if size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} bytes of {self.size_bytes} free")
        piece = self.take_piece(size_bytes)
        if piece is not None:
            return (piece,)
        taken: list[Extent] = []
        for extent in sorted(self._extents, key=lambda extent: (-extent.size_bytes, extent.offset)):
            length = min(extent.size_bytes, size_bytes)
            if length:
                taken.append(Extent(extent.offset, length))
            size_bytes -= length
        self.remove(taken)
        return tuple(taken)

    def remove(self, extents: Iterable[Extent]) -> None:
        """Raises ValueError if any byte of them is not free."""
        for taken in extents:
            around = next((each for each in self._extents if _contains(each, taken)), None)
            odd = taken.offset % self._unit_bytes or taken.size_bytes % self._unit_bytes
            if around is None or taken.size_bytes <= 0 or odd:
                raise ValueError(f"{taken} is not free")
            self._extents.remove(around)
            before = Extent(around.offset, taken.offset - around.offset)
            after = Extent(_end(taken), _end(around) - _end(taken))
            for rest in (before, after):
                if rest.size_bytes:
                    insort(self._extents, rest)

    def give_back(self, extent: Extent) -> None:
        """It must not be free."""
        insort(self._extents, extent)
        merged: list[Extent] = []
        for each in self._extents:
            if merged and _end(merged[-1]) == each.offset:
                each = Extent(merged[-1].offset, merged[-1].size_bytes + each.size_bytes)
                merged.pop()
            merged.append(each)
        assert all(_end(one) < other.offset for one, other in pairwise(merged)), "memory was given back twice"
        self._extents = merged


def _contains(outer: Extent, inner: Extent) -> bool:
    return outer.offset <= inner.offset and _end(inner) <= _end(outer)


def _end(extent: Extent) -> int:
    return extent.offset + extent.size_bytes
