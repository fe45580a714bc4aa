"""An engine host's process, watched by its pidfd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

from sllm.agent.processes import is_child, open_process, reap, signal_group


class ForkedHost:
    """A process that was forked for us, or found again after a restart. Takes over `pidfd`.

    `on_end` is called once it is gone, and reaped if it was our child.
    """

    def __init__(self, pid: int, pidfd: int, on_end: Callable[[], None]) -> None:
        self._pid = pid
        self._pidfd = pidfd
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._take_end)

    @classmethod
    def open(cls, pid: int, ticks: int | None = None, on_end: Callable[[], None] = lambda: None) -> ForkedHost | None:
        """Return None if it is gone; `ticks` tells it from a later process with this pid."""
        pidfd = open_process(pid, ticks)
        return None if pidfd is None else cls(pid, pidfd, on_end)

    @property
    def pid(self) -> int:
        return self._pid

    async def ended(self) -> str:
        return await asyncio.shield(self._ended)

    def signal(self, number: signal.Signals) -> None:
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)  # it may not lead its group yet
            signal_group(self._pid, number)

    def close(self) -> None:
        """Stop watching; the process goes on."""
        if not self._ended.done():
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._ended.cancel()

    def _take_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        if is_child(self._pidfd):
            signal_group(self._pid, signal.SIGKILL)  # what it left behind; before reaping, see `signal_group`
        how = reap(self._pidfd)
        os.close(self._pidfd)
        self._on_end()
        self._ended.set_result(how)
