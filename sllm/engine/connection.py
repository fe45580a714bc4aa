"""One gateway's token stream, as its engine host sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from sllm.core.tokens import StepOutputs
from sllm.errors import SllmError, Unavailable

# A gateway that does not read for this many engine steps has a problem that more memory here would not solve.
MAX_UNREAD_STEPS = 8192


class Connection:
    """Its open requests by stream id, and the steps that its gateway has not read yet."""

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.keys: dict[int, int] = {}
        self._unread: deque[StepOutputs] = deque()
        self._changed = asyncio.Event()
        self._spoke = False  # since the last beat
        self._closed = False
        self._error: SllmError | None = None

    def send(self, step: StepOutputs) -> bool:
        """Queue a step. False: the reader is too far behind, and has lost its connection."""
        if len(self._unread) >= MAX_UNREAD_STEPS:
            self.close(Unavailable(f"gateway {self.gateway!r} is {MAX_UNREAD_STEPS} steps behind in reading"))
        if not self._closed:
            self._spoke = True
            self._unread.append(step)
            self._changed.set()
        return not self._closed

    def beat(self, sign_of_life: StepOutputs) -> None:
        """Queue it if there are requests, and nothing was sent since the last beat or is still to be read."""
        if self.keys and not self._spoke and not self._unread:
            self.send(sign_of_life)
        self._spoke = False

    def close(self, error: SllmError | None = None) -> None:
        """End the stream after what is queued: normally, or by raising `error` at its reader."""
        if not self._closed:
            self._closed = True
            self._error = error
            self._changed.set()

    async def steps(self) -> AsyncIterator[StepOutputs]:
        """Yield steps until the connection is closed."""
        while True:
            while self._unread:
                yield self._unread.popleft()
            if self._closed:
                break
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error
