"""What our processes ask of the Linux kernel: who a pid is, whose orphans are whose, one owner per state folder."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from sllm.errors import Conflict

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, argument: int | bytes) -> None:
    """Set an attribute of this process, see prctl(2). Raises OSError."""
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def become_subreaper() -> None:
    """Make this process the parent of every descendant whose own parent is gone. Raises OSError."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def step_back(nice: int) -> None:
    """Let others have the CPU first: `nice` for this process, and for its session where the kernel schedules by session
    (autogroup, see sched(7)), which makes the niceness of processes count within their own session only."""
    os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
    with contextlib.suppress(OSError):  # the kernel was built without it
        Path("/proc/self/autogroup").write_text(str(nice), encoding="ascii")


def start_ticks(pid: int) -> int | None:
    """Return when a process began (field 22 of /proc/PID/stat), which no later process with its pid shares.

    None: it is gone or a zombie.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def claim(path: Path, taken: Callable[[str], Conflict]) -> int:
    """Lock a file for this process and write our pid into it; the kernel ends the claim with the descriptor returned.

    Raises `taken(holder)`, with the pid in the file, if another has it; OSError if the file cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise taken(holder) from None
    except BaseException:
        os.close(fd)
        raise
    os.truncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd
