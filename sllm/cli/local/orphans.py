"""Processes that lost their parent and became ours: reaped when they end, ended when we do.

An agent that is killed leaves its engine hosts behind, on purpose: the next agent takes them over. Until then, and
if it never comes, they are this process' children.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress

import psutil

from sllm.linux import become_subreaper


def adopt(ours: Callable[[], set[int]]) -> None:
    """From now on be the parent of orphans and reap them; the processes that `ours` returns are reaped elsewhere."""
    become_subreaper()
    asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, _reap, ours)


def _reap(ours: Callable[[], set[int]]) -> None:
    for process in psutil.Process().children():
        if process.pid not in ours():
            with suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def end_all() -> None:
    """Kill every descendant of this process that is left, and reap those that become its children."""
    asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
    # Killing a process can make its children ours: look again until there is none.
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in left:
            with suppress(ChildProcessError):
                os.waitpid(process.pid, 0)
