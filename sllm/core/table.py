"""Table: a mapping that is changed by one owner and looked at by many, each of whom sees it as it was when they got it.

A view costs nothing, and a change after a view a copy of one bucket and of the list of them, both in the order of the
square root of all. Iteration is in the order of the keys, the same in every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from itertools import chain
from typing import TypeVar, overload

K = TypeVar("K", bound=str | tuple[str, str | int])
V = TypeVar("V")
D = TypeVar("D")

# Buckets are more than entries in one by this factor: copying an entry is dearer than copying a bucket's place.
_SHARE = 4


class View(Mapping[K, V]):
    """Immutable, but for a `Table`, which is its own."""

    __slots__ = ("_buckets", "_count", "_mask")

    def __init__(self, buckets: list[dict[K, V]], count: int) -> None:
        self._buckets = buckets
        self._mask = len(buckets) - 1
        self._count = count

    def __getitem__(self, key: K) -> V:
        return self._buckets[hash(key) & self._mask][key]

    @overload
    def get(self, key: K) -> V | None: ...
    @overload
    def get(self, key: K, default: V | D) -> V | D: ...
    def get(self, key: K, default: V | D | None = None) -> V | D | None:
        return self._buckets[hash(key) & self._mask].get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._buckets[hash(key) & self._mask]

    def __iter__(self) -> Iterator[K]:
        return iter(sorted(chain.from_iterable(self._buckets)))

    def __len__(self) -> int:
        return self._count


class Table(View[K, V], MutableMapping[K, V]):
    """For one owner."""

    def __init__(self, entries: Mapping[K, V] | None = None) -> None:
        super().__init__([{}], 0)
        # Of the buckets, those that no view has.
        self._own = {0}
        self._view: View[K, V] | None = None
        for key, value in (entries or {}).items():
            self[key] = value

    def view(self) -> View[K, V]:
        """The table as it is now."""
        if self._view is None:
            self._view = View(self._buckets, self._count)
            self._own = set()
        return self._view

    def __setitem__(self, key: K, value: V) -> None:
        bucket = self._changeable(key)
        if key not in bucket:
            self._count += 1
        bucket[key] = value
        if self._count * _SHARE > len(self._buckets) ** 2:
            self._grow()

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        del self._changeable(key)[key]
        self._count -= 1

    def _changeable(self, key: K) -> dict[K, V]:
        number = hash(key) & self._mask
        if self._view is not None:
            self._view = None
            self._buckets = self._buckets.copy()
        if number not in self._own:
            self._buckets[number] = self._buckets[number].copy()
            self._own.add(number)
        return self._buckets[number]

    def _grow(self) -> None:
        entries = [entry for bucket in self._buckets for entry in bucket.items()]
        self._buckets = [{} for _ in range(2 * len(self._buckets))]
        self._mask = len(self._buckets) - 1
        self._own = set(range(len(self._buckets)))
        for key, value in entries:
            self._buckets[hash(key) & self._mask][key] = value


class TrackedTable(Table[K, V]):
    """Remembers what has changed until its owner asks."""

    def __init__(self, entries: Mapping[K, V] | None = None) -> None:
        self._before: dict[K, V | None] = {}
        super().__init__(entries)

    def changes(self) -> dict[K, V | None]:
        """The keys that were set or deleted since this was last asked, with what they had before (None: nothing)."""
        before, self._before = self._before, {}
        return before

    def __setitem__(self, key: K, value: V) -> None:
        if key not in self._before:
            self._before[key] = self.get(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: K) -> None:
        before = self[key]
        self._before.setdefault(key, before)
        super().__delitem__(key)
