"""Inbox: the one queue of events to the writer, with a way to wait for the answer to one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sllm.errors import Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    event: object
    reply: asyncio.Future[Any] | None = None


class Inbox:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[Envelope] = asyncio.Queue()
        self._closed = False

    def post(self, event: object) -> None:
        """Add an event that nobody waits for."""
        if not self._closed:
            self._queue.put_nowait(Envelope(event=event))

    async def submit(self, event: object) -> Any:
        """Add an event and return the writer's answer to it, or raise it."""
        if self._closed:
            raise _stopping()
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Envelope(event=event, reply=reply))
        return await reply

    async def batch(self) -> Iterator[Envelope]:
        """Wait for an event and return it with all that came meanwhile, so that one plan serves them all.

        They stay in the queue until their turn: what a writer that ends does not come to is refused by `close`.
        """
        first = await self._queue.get()
        return itertools.chain([first], (self._queue.get_nowait() for _ in range(self._queue.qsize())))

    def close(self) -> None:
        """Refuse what has not been handled, and all that comes."""
        self._closed = True
        while not self._queue.empty():
            reply = self._queue.get_nowait().reply
            if reply and not reply.done():
                reply.set_exception(_stopping())


def _stopping() -> Unavailable:
    return Unavailable("the controller is stopping", hint="try again in a moment")
