"""Temporary files of engine hosts: a folder for each replica, removed when its process is gone."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from sllm.core.ids import ReplicaId

_GONE = ".gone-"


class Scratch:
    """A host makes its folder itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, replica: ReplicaId) -> Path:
        return self._folder / replica

    def remove(self, replica: ReplicaId) -> None:
        """Take the folder away at once, so that its name is free; what is in it goes in a thread."""
        gone = self._folder / f"{_GONE}{secrets.token_hex(6)}"
        try:
            self.path(replica).rename(gone)
        except FileNotFoundError:
            return  # it never got so far
        asyncio.get_running_loop().run_in_executor(None, lambda: shutil.rmtree(gone, ignore_errors=True))

    def keep_only(self, living: Collection[ReplicaId]) -> None:
        """Remove what dead hosts of earlier agents left. Blocking."""
        for path in self._folder.iterdir():
            if path.name not in living:
                shutil.rmtree(path, ignore_errors=True)
