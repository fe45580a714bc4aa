"""Who reaps whom."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from sllm.agent.children import Children


@pytest.fixture
async def children() -> Iterator[Children]:
    """Those of this process, reaped as they end."""
    watched = Children()
    watched.watch()
    yield watched
    asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)


def spawn() -> int:
    """Start a process that ends at once."""
    return os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-S", "-c", ""])


async def ended(pid: int) -> None:
    """Wait until a child has ended and its signal has been dealt with."""
    pidfd, seen = os.pidfd_open(pid), asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, seen.set)
    async with asyncio.timeout(10):
        await seen.wait()
    asyncio.get_running_loop().remove_reader(pidfd)
    os.close(pidfd)
    for _ in range(3):
        await asyncio.sleep(0)


def is_zombie(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


async def test_a_child_without_an_owner_does_not_stay_a_zombie(children: Children) -> None:
    pid = spawn()
    await ended(pid)
    assert not is_zombie(pid)


async def test_a_child_with_an_owner_is_left_to_it(children: Children) -> None:
    pid = spawn()
    children.own(pid)
    await ended(pid)
    assert is_zombie(pid)
    os.waitpid(pid, 0)
    children.disown(pid)


async def test_a_child_whose_pid_is_not_known_yet_is_not_reaped(children: Children) -> None:
    with children.coming():
        pid, other = spawn(), spawn()
        await ended(pid)
        await ended(other)
        assert is_zombie(pid)
        assert is_zombie(other)
        children.own(pid)
    assert is_zombie(pid)
    assert not is_zombie(other)
    os.waitpid(pid, 0)
