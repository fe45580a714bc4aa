"""Processes of this machine: told apart from later ones with the same pid, signalled as groups, reaped one by one."""

from __future__ import annotations

import contextlib
import os
import signal

from sllm.linux import start_ticks


def open_process(pid: int, ticks: int | None = None) -> int | None:
    """Return a pidfd, which names this one process for ever; None if it is gone or, by `ticks`, another one."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if ticks is not None and start_ticks(pid) != ticks:
        os.close(pidfd)
        return None
    return pidfd


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the process group that `pid` leads; one that is gone is no error.

    Only while the leader is not reaped: after that the number may be another group's.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def is_child(pidfd: int) -> bool:
    """True if the process is ours to reap. Engine hosts found after a restart of the agent are not."""
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def reap(pidfd: int) -> str:
    """Collect a process that has ended and say how; one that is not our child (its agent died) ended unseen."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return "ended"
    if result is None:
        return "ended"
    if result.si_code == os.CLD_EXITED:
        return f"exit code {result.si_status}"
    return f"signal {result.si_status}"
