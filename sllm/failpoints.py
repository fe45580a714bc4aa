"""Named places where a test can kill this process, to prove that a restart finds everything in order.

`SLLM_FAILPOINT=NAME` in the environment makes the process end with SIGKILL when it first comes to that place: no
clean-up runs, as when the power goes. Without it a failpoint costs one dictionary look-up. Imports nothing of ours.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "SLLM_FAILPOINT"


def failpoint(name: str) -> None:
    """Die here if `name` is the failpoint that was asked for."""
    if os.environ.get(VARIABLE) == name:
        os.kill(os.getpid(), signal.SIGKILL)
