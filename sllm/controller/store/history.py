"""The recent revisions of a store, in memory, and those who watch them. Shared by all embedded stores."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from sllm.controller.store.base import WatchEvent
from sllm.errors import Conflict

KEPT_REVISIONS = 10_000


class History:
    """Revisions after `revision`, which is the store's when it was opened."""

    def __init__(self, revision: int, *, kept: int = KEPT_REVISIONS) -> None:
        self._oldest = revision + 1
        self._kept = kept
        self._revisions: deque[tuple[WatchEvent, ...]] = deque()
        self._changed = asyncio.Event()

    def append(self, events: tuple[WatchEvent, ...]) -> None:
        """Add the next revision and wake the watchers."""
        self._revisions.append(events)
        if len(self._revisions) > self._kept:
            self._revisions.popleft()
            self._oldest += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, prefix: str, from_rev: int) -> AsyncIterator[tuple[WatchEvent, ...]]:
        revision = from_rev
        while True:
            if revision < self._oldest:
                raise Conflict(
                    f"revision {revision} is not kept any more, the oldest is {self._oldest}",
                    hint="read the range again and watch from its revision",
                )
            # Taken before looking: what is appended while a consumer is busy must not be missed.
            changed = self._changed
            while self._oldest <= revision < self._oldest + len(self._revisions):
                events = tuple(e for e in self._revisions[revision - self._oldest] if e.key.startswith(prefix))
                revision += 1
                if events:
                    yield events
                changed = self._changed
            if revision >= self._oldest:
                await changed.wait()
