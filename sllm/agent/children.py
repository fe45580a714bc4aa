"""The agent's children. The kernel gives it the orphans among its descendants: engine hosts, which have an owner here,
and what dead hosts leave behind, which has none. Who has no owner is reaped here, so that no zombie stays.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


class Children:
    """An owned child is left to its owner, who wants to know how it ended."""

    def __init__(self) -> None:
        self._owned: set[int] = set()
        self._coming = 0

    def watch(self) -> None:
        """From now on reap whenever a child ends. Call it in the running loop of the main thread."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self.reap)

    def own(self, pid: int) -> None:
        self._owned.add(pid)

    def disown(self, pid: int) -> None:
        """Call it once the child is reaped."""
        self._owned.discard(pid)

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Hold while a child is made whose pid is not known yet: until then none is reaped."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            self.reap()

    def reap(self) -> None:
        """Reap every child that has ended and has no owner."""
        if self._coming:
            return
        for process in psutil.Process().children():
            if process.pid not in self._owned:
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
