"""One `sllm dev` per state folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sllm.errors import Conflict


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises Conflict, naming the process that holds it. The kernel frees it if we die."""
    with (state / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise Conflict(
                f"a cluster already runs on {state} (process {holder})", hint="stop it, or give another --state DIR"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def was_abandoned(state: Path) -> bool:
    """Return whether a cluster ran on this folder and none does now."""
    try:
        with (state / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except OSError:  # there never was one, or one holds it
        return False
