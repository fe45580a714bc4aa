"""The agent's state folder: what is where, for this user alone, and for one agent at a time."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from sllm.errors import Conflict, InvalidConfiguration


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    checkpoints: Path
    run: Path  # launch records of engine hosts
    log: Path
    scratch: Path  # what libraries write for themselves: temporary files, caches


def prepare(state: Path) -> Folders:
    """Make the folders. Raises InvalidConfiguration."""
    root = state.absolute()
    folders = Folders(checkpoints=root / "checkpoints", run=root / "run", log=root / "log", scratch=root / "scratch")
    try:
        for folder in (root, folders.checkpoints, folders.run, folders.log):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfiguration(f"cannot make state_dir {root}: {error.strerror}") from error
    return folders


def lock(state: Path) -> int:
    """Claim a state folder for this process; the claim ends with it. Raises Conflict."""
    fd = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Conflict(f"{state} is in use by another agent, process {holder}", hint="stop it first") from error
    os.truncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd
