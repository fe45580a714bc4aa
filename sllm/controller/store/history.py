"""The recent revisions of a store, in memory, and those who watch them. Shared by all embedded stores."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from sllm.controller.store.base import WatchEvent
from sllm.errors import Conflict

KEPT_REVISIONS = 10_000
KEPT_UNWATCHED = 100  # enough to read a range and watch from there


class History:
    """Revisions after `revision`, which is the store's when it was opened. While nobody watches, few are kept."""

    def __init__(self, revision: int, *, kept: int = KEPT_REVISIONS, kept_unwatched: int = KEPT_UNWATCHED) -> None:
        self._oldest = revision + 1
        self._kept = kept
        self._kept_unwatched = min(kept, kept_unwatched)
        self._watchers = 0
        self._revisions: deque[tuple[WatchEvent, ...]] = deque()
        self._changed = asyncio.Event()

    def append(self, events: tuple[WatchEvent, ...]) -> None:
        """Add the next revision and wake the watchers."""
        self._revisions.append(events)
        self._trim()
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, prefix: str, from_rev: int) -> AsyncIterator[tuple[WatchEvent, ...]]:
        self._watchers += 1
        try:
            async for events in self._follow(prefix, from_rev):
                yield events
        finally:
            self._watchers -= 1
            self._trim()

    def _trim(self) -> None:
        while len(self._revisions) > (self._kept if self._watchers else self._kept_unwatched):
            self._revisions.popleft()
            self._oldest += 1

    async def _follow(self, prefix: str, from_rev: int) -> AsyncIterator[tuple[WatchEvent, ...]]:
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
