"""What keeping a child process alive takes, whichever it is: the wait between attempts, those who wait for it, its
surroundings. What the child is, and when it is ready, is its keeper's to say."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from sllm.errors import SllmError
from sllm.lifecycle import scratch_environment

T = TypeVar("T")

_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


async def keep_attempting(attempt: Callable[[], Awaitable[bool]], backoff_s: tuple[float, float]) -> None:
    """Attempt for ever; `attempt` returns, when the process has ended, whether it ever was ready."""
    wait_s = backoff_s[0]
    while True:
        wait_s = next_wait_s(wait_s, await attempt(), backoff_s)
        await asyncio.sleep(wait_s)


def next_wait_s(last_s: float, was_ready: bool, backoff_s: tuple[float, float]) -> float:
    """Return the shortest wait after a process that was ready, else twice the last one, up to the longest."""
    shortest_s, longest_s = backoff_s
    return shortest_s if was_ready else min(longest_s, last_s * 2)


class Awaited(Generic[T]):
    """A way to speak to the process that is there, or to the next one. Belongs to the event loop."""

    def __init__(self) -> None:
        self._future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    @property
    def is_there(self) -> bool:
        return self._future.done()

    async def get(self) -> T:
        """Wait for it. Raises what the attempt failed with that was under way."""
        return await asyncio.shield(self._future)

    def has_come(self, value: T) -> None:
        self._future.set_result(value)

    def has_gone(self) -> None:
        """Let those who ask from now on wait for the next; some may already."""
        if self._future.done():
            self._future = asyncio.get_running_loop().create_future()

    def fail(self, error: SllmError) -> None:
        """Fail those who wait; later ones wait for the next attempt."""
        waiting, self._future = self._future, asyncio.get_running_loop().create_future()
        waiting.set_exception(error)
        waiting.exception()  # seen, also when nobody waits

    def cancel(self) -> None:
        self._future.cancel()


def child_environment(scratch: Path) -> dict[str, str]:
    """Return the environment of a child whose temporary files go to `scratch`, and which has no supervisor to tell."""
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    return inherited | scratch_environment(scratch)


@contextmanager
def output_to(log_path: Path) -> Iterator[int]:
    """Open a log file that only this user reads, to append to, for as long as it takes to start a child with it."""
    output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield output
    finally:
        os.close(output)
