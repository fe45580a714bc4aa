"""Processes: which one is meant, and how it ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable

from sllm.agent.processes import open_process, reap
from sllm.agent.warm.host import ForkedHost
from sllm.linux import start_ticks

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")


def test_a_process_is_known_by_pid_and_start() -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    pidfd = open_process(os.getpid(), ticks)
    assert pidfd is not None
    os.close(pidfd)
    assert open_process(os.getpid(), ticks + 1) is None
    assert open_process(1 << 30) is None


def test_a_zombie_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_ticks(process.pid) is None
    process.wait()


def test_how_a_process_ended_is_said() -> None:
    for code, expected in [("raise SystemExit(3)", "exit code 3"), ("import os; os.kill(os.getpid(), 9)", "signal 9")]:
        pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code])
        pidfd = os.pidfd_open(pid)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        assert reap(pidfd) == expected
        assert reap(pidfd) == "ended"  # it is not ours any more
        os.close(pidfd)


def leader_and_member() -> tuple[int, int]:
    """Start a process that leads a group of two."""
    code = f"import subprocess, time; print(subprocess.Popen({list(SLEEP)!r}).pid, flush=True); time.sleep(60)"
    leader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    member = int(leader.stdout.readline())
    leader.stdout.close()
    leader.returncode = 0  # it will be reaped by others
    return leader.pid, member


async def test_a_host_is_ended_with_its_whole_group(process_end: Callable[[int], Awaitable[None]]) -> None:
    leader, member = leader_and_member()
    host = ForkedHost.open(leader)
    assert host is not None
    os.kill(leader, signal.SIGTERM)  # only the leader
    assert await host.ended() == "signal 15"
    await process_end(member)
    host.signal(signal.SIGKILL)  # it is gone: no error, and nobody else is hit


async def test_a_host_can_be_left_alone() -> None:
    process = await asyncio.create_subprocess_exec(*SLEEP)
    host = ForkedHost.open(process.pid)
    assert host is not None
    host.close()
    assert start_ticks(process.pid) is not None
    process.kill()
    await process.wait()
