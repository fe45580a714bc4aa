"""MemoryStore: the StateStore that forgets when it is closed. The model that the others are tested against."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from sllm.controller.store.base import Compare, Item, Op, Put, TxnResult, WatchEvent
from sllm.controller.store.history import History


class MemoryStore:
    def __init__(self) -> None:
        self._items: dict[str, Item] = {}
        self._revision = 0
        self._history = History(0)

    async def get(self, key: str) -> Item | None:
        return self._items.get(key)

    async def range(self, prefix: str) -> tuple[tuple[Item, ...], int]:
        found = (self._items[key] for key in sorted(self._items) if key.startswith(prefix))
        return tuple(found), self._revision

    async def txn(self, when: Sequence[Compare], then: Sequence[Op]) -> TxnResult:
        if not all(self._mod_rev(c.key) == c.mod_rev for c in when):
            return TxnResult(succeeded=False, revision=self._revision)
        events = tuple(event for op in then if (event := self._apply(op)))
        if events:
            self._revision += 1
            self._history.append(events)
        return TxnResult(succeeded=True, revision=self._revision)

    def watch(self, prefix: str, *, from_rev: int) -> AsyncIterator[tuple[WatchEvent, ...]]:
        return self._history.watch(prefix, from_rev)

    async def close(self) -> None:
        self._items.clear()

    def _mod_rev(self, key: str) -> int:
        item = self._items.get(key)
        return item.mod_rev if item else 0

    def _apply(self, op: Op) -> WatchEvent | None:
        revision = self._revision + 1
        if isinstance(op, Put):
            before = self._items.get(op.key)
            created = before.create_rev if before else revision
            self._items[op.key] = Item(key=op.key, value=op.value, create_rev=created, mod_rev=revision)
            return WatchEvent(key=op.key, value=op.value, revision=revision)
        if self._items.pop(op.key, None) is None:
            return None
        return WatchEvent(key=op.key, value=None, revision=revision)
