"""Verification of a checkpoint's files on SSD, which nobody waits for: it rests while anything is loaded."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from sllm.agent.store.channel import Channel
from sllm.agent.store.protocol import Check, Checked, Checking, Refused
from sllm.errors import InvalidCheckpoint, SllmError
from sllm.loader.folder import read_manifest
from sllm.loader.verifying import verify

_REST_S = 1.0  # how often a check that rests looks whether it was called off


class FolderCheck:
    """One Check. `idle` is set while nothing is loaded."""

    def __init__(self, channel: Channel, request: Check, idle: threading.Event) -> None:
        self.channel = channel
        self.request = request
        self._idle = idle
        self._called_off = False
        self._loop = asyncio.get_running_loop()
        self._progress: tuple[int, int] | None = None  # that is to be told

    def call_off(self) -> None:
        self._called_off = True

    async def run(self) -> tuple[str, InvalidCheckpoint] | None:
        """Verify, and answer. Returns the digest and what is wrong if the files are not what was written."""
        try:
            await asyncio.to_thread(
                verify,
                self.request.folder,
                deep=self.request.deep,
                progress=self._on_progress,
                cancelled=self._rest,
            )
        except SllmError as error:
            refused = Refused(id=self.request.id, reason=error.reason, message=error.message, hint=error.hint)
            self.channel.send(refused)
            return await self._damage(error)
        self.channel.send(Checked(id=self.request.id))
        return None

    async def _damage(self, error: SllmError) -> tuple[str, InvalidCheckpoint] | None:
        if not isinstance(error, InvalidCheckpoint):
            return None
        try:
            manifest = await asyncio.to_thread(read_manifest, Path(self.request.folder))
        except SllmError:
            return "", error  # whatever it was
        return manifest.digest, error

    def _rest(self) -> bool:
        """In a thread: wait while something is loaded; return whether it was called off."""
        while not self._called_off and not self._idle.wait(_REST_S):
            pass
        return self._called_off

    def _on_progress(self, done_bytes: int, total_bytes: int) -> None:
        """In a thread."""
        told, self._progress = self._progress is None, (done_bytes, total_bytes)
        if told:
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            self.channel.send(Checking(id=self.request.id, done_bytes=progress[0], total_bytes=progress[1]))
