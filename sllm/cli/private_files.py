"""Files and folders that only their owner may read."""

from __future__ import annotations

import os
from pathlib import Path


def make_private_dir(path: Path) -> None:
    """Make a folder with mode 0700; one that is there already keeps its mode."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


def write_private(path: Path, content: bytes) -> None:
    """Write a file with mode 0600; a reader sees the old content or the new one, never a part."""
    make_private_dir(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # a file left by a crash may have had another mode
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)
