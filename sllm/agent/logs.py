"""Log files of engine hosts: their last lines, and how many files are kept. Blocking."""

from __future__ import annotations

import os
from pathlib import Path

_BLOCK_BYTES = 64 << 10
MAX_TAIL_BYTES = 8 << 20
KEPT_FILES = 64


def tail_lines(path: Path, lines: int) -> list[str]:
    """Return the last lines of a file, oldest first, each with its line end; none if there is no such file."""
    try:
        with open(path, "rb") as file:
            return _tail(file.fileno(), lines)
    except FileNotFoundError:
        return []


def _tail(fd: int, lines: int) -> list[str]:
    position = os.fstat(fd).st_size
    kept = b""
    while position > 0 and kept.count(b"\n") <= lines and len(kept) < MAX_TAIL_BYTES:
        start = max(0, position - _BLOCK_BYTES)
        kept = os.pread(fd, position - start, start) + kept
        position = start
    return kept.decode("utf-8", errors="replace").splitlines(keepends=True)[-lines:] if lines > 0 else []


def prune(folder: Path) -> None:
    """Remove the oldest log files of replicas beyond `KEPT_FILES`."""
    files = sorted(folder.glob("rep-*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[KEPT_FILES:]:
        path.unlink(missing_ok=True)
