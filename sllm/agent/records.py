"""Launch records: one JSON file per living engine host, written by the host. Watched with inotify, never polled."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
from pathlib import Path

from sllm.agent.changes import Changes
from sllm.core.ids import ReplicaId
from sllm.core.launch import LaunchRecord
from sllm.errors import SllmError

log = logging.getLogger(__name__)

_IN_MOVED_TO = 0x80  # hosts write to another name and rename


class Records:
    """The folder of records. `changes` is notified after each new one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.changes = Changes()
        self._watch = _watch(folder)
        asyncio.get_running_loop().add_reader(self._watch, self._on_event)

    def path(self, replica: ReplicaId) -> Path:
        return self._folder / f"{replica}.json"

    def read_all(self) -> tuple[LaunchRecord, ...]:
        """Return all records; what cannot be read as one is removed."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                found.append(LaunchRecord.from_json(path.read_text(encoding="utf-8")))
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, KeyError) as error:
                log.error("%s is not a launch record, it is removed: %s", path, error)
                path.unlink(missing_ok=True)
        return tuple(found)

    async def wait_for(self, replica: ReplicaId, nonce: str) -> LaunchRecord:
        """Return the record once the host has written it."""
        while True:
            seen = self.changes.revision
            with contextlib.suppress(FileNotFoundError):
                record = LaunchRecord.from_json(self.path(replica).read_text(encoding="utf-8"))
                if record.nonce == nonce:
                    return record
            await self.changes.wait_beyond(seen)

    def remove(self, replica: ReplicaId) -> None:
        self.path(replica).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the unfinished records of killed hosts. Only while none is alive."""
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._watch)
        os.close(self._watch)

    def _on_event(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._watch, 1 << 16)  # which file it was does not matter
        self.changes.notify()


def _watch(folder: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(folder), _IN_MOVED_TO) < 0:
        raise SllmError(
            f"cannot watch {folder}: {os.strerror(ctypes.get_errno())}", hint="raise fs.inotify.max_user_instances"
        )
    return int(fd)
