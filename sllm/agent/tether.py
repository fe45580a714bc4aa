"""Runs a command that ends with its parent: `python tether.py PARENT_PID COMMAND...`.

A script, not a module of the package: it runs for some milliseconds before the command takes its place. The signal at
the parent's death survives exec, and setting it in a fresh process needs no code between fork and exec in the agent,
whose gRPC threads make that unsafe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the parent is gone")  # it died before the call above
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
