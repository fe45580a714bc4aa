"""One `sllm dev` per state folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sllm.errors import Conflict
from sllm.linux import claim


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises Conflict, naming the process that holds it. The kernel frees it if we die."""

    def taken(holder: str) -> Conflict:
        return Conflict(
            f"a cluster already runs on {state} (process {holder})", hint="stop it, or give another --state DIR"
        )

    fd = claim(state / "lock", taken)
    try:
        yield
    finally:
        os.close(fd)


def was_abandoned(state: Path) -> bool:
    """Return whether a cluster ran on this folder and none does now."""
    try:
        with (state / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except OSError:  # there never was one, or one holds it
        return False
