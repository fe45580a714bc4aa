"""Latest: a value that changes, and those who follow it. A slow follower skips what was replaced meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    def __init__(self, value: T) -> None:
        self._value = value
        self._changed = asyncio.Event()

    @property
    def value(self) -> T:
        return self._value

    def set(self, value: T) -> None:
        """Replace the value; an equal one wakes nobody."""
        if value == self._value:
            return
        self._value = value
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncIterator[T]:
        """Yield the value, then what it changes to, for ever."""
        while True:
            changed, value = self._changed, self._value
            yield value
            await changed.wait()
