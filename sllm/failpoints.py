"""Named places where a test can kill or stop this process, to prove that everything is in order afterwards.

`SLLM_FAILPOINT=NAME` in the environment makes the process end with SIGKILL when it first comes to that place: no
clean-up runs, as when the power goes. `SLLM_FAILPOINT=@FILE` asks a file instead, which may be written at any time:
its content is `NAME` or `NAME SIGNAL` (`KILL`, `STOP`), and whoever comes to that place first, of all processes that
look at the file, removes it and gets the signal: one arming, one fault. Without the variable a failpoint costs one
dictionary look-up. Imports nothing of ours.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "SLLM_FAILPOINT"

_SIGNALS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}


def failpoint(name: str) -> None:
    """Die (or stop) here if `name` is the failpoint that was asked for."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    if wanted == name:
        os.kill(os.getpid(), signal.SIGKILL)
    elif wanted.startswith("@"):
        _ask(wanted[1:], name)


def _ask(path: str, name: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            armed, _, kind = file.read().strip().partition(" ")
        if armed == name:
            os.unlink(path)  # only one process can
            os.kill(os.getpid(), _SIGNALS[kind or "KILL"])
    except FileNotFoundError:
        return
