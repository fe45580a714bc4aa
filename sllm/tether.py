"""Runs a command that gets a signal when its parent ends: `python tether.py PARENT_PID SIGNAL COMMAND...`.

A script, not a module of the package: it runs for some milliseconds before the command takes its place. The signal at
the parent's death survives exec, and setting it in a fresh process needs no code between fork and exec in the parent,
whose gRPC threads make that unsafe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, number, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the parent is gone")  # it died before the call above
    try:
        os.execv(command[0], command)
    except OSError as error:
        raise SystemExit(f"error: could not be started: {error.strerror}") from None


def tethered(command: Sequence[str], number: signal.Signals) -> tuple[str, ...]:
    """Return how a child of this process is run so that `number` reaches it when this process ends in whatever way."""
    return (sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(number)), *command)


if __name__ == "__main__":
    main()
