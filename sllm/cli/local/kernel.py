"""What the Linux kernel does for a supervisor: ending its children with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from sllm.linux import PR_SET_PDEATHSIG, prctl


def dies_with_parent() -> Callable[[], None]:
    """Return what a child runs before exec, so that it is killed when this process ends in whatever way."""
    parent = os.getpid()

    def before_exec() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before the line above
            os._exit(1)

    return before_exec
