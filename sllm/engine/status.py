"""The host's account of its replica, and those who follow it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from sllm.rpc.engine import HostStatus


class StatusBoard:
    """Holds the current status. A follower sees the latest one, never a queue of old ones."""

    def __init__(self, status: HostStatus) -> None:
        self._status = status
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def status(self) -> HostStatus:
        return self._status

    def update(self, **changes: Any) -> None:
        """Replace fields; followers are woken only if that changes anything."""
        status = replace(self._status, **changes)
        if status != self._status:
            self._status = status
            self._wake()

    def close(self) -> None:
        """End all followers once they have seen the last status."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        # A new event for each change: a follower that is busy meanwhile finds the old one set.
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncIterator[HostStatus]:
        while True:
            status, changed, last = self._status, self._changed, self._closed
            yield status
            if last:
                return
            await changed.wait()
