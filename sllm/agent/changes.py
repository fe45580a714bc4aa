"""Changes: wakes whoever waits for something new. Belongs to one event loop."""

from __future__ import annotations

import asyncio


class Changes:
    """`revision` grows with each `notify`; `wait_beyond` returns once it is higher than what the waiter has seen."""

    def __init__(self) -> None:
        self.revision = 0
        self._event = asyncio.Event()

    def notify(self) -> None:
        self.revision += 1
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait_beyond(self, seen: int) -> int:
        while self.revision <= seen:
            await self._event.wait()
        return self.revision
