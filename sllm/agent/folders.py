"""The agent's state folder: what is where, for this user alone, and for one agent at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sllm.errors import Conflict, InvalidConfiguration
from sllm.linux import claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    checkpoints: Path
    run: Path  # launch records of engine hosts
    log: Path
    scratch: Path  # what libraries write for themselves: `shared` caches, temporary files of each `replicas/ID`


def prepare(state: Path) -> Folders:
    """Make the folders. Raises InvalidConfiguration."""
    root = state.absolute()
    folders = Folders(checkpoints=root / "checkpoints", run=root / "run", log=root / "log", scratch=root / "scratch")
    try:
        for folder in (root, folders.checkpoints, folders.run, folders.log, folders.scratch / "replicas"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfiguration(f"cannot make state_dir {root}: {error.strerror}") from error
    return folders


def lock(state: Path) -> int:
    """Claim a state folder for this process; the claim ends with it. Raises Conflict."""

    def taken(holder: str) -> Conflict:
        return Conflict(f"{state} is in use by another agent, process {holder}", hint="stop it first")

    return claim(state / "lock", taken)
