"""Verification of checkpoints' files on SSD, which nobody waits for: it rests while anything is loaded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from sllm.agent.store.channel import Channel
from sllm.agent.store.protocol import Damaged, Message, Refused, Verified, Verify, Verifying
from sllm.agent.store.quiet import Quiet
from sllm.errors import Cancelled, InvalidCheckpoint, SllmError
from sllm.loader.folder import read_manifest
from sllm.loader.verifying import verify

log = logging.getLogger(__name__)


class Verifications:
    """They take their turns in one thread of their own, where resting holds up nobody else."""

    def __init__(self, quiet: Quiet, tell: Callable[[Message], None]) -> None:
        self._quiet = quiet
        self._tell = tell
        self._wanted: dict[Verification, asyncio.Task[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verify-files")

    def begin(self, channel: Channel, request: Verify) -> None:
        verification = Verification(channel, request, self._quiet)
        self._wanted[verification] = asyncio.create_task(self._run(verification))

    def leave(self, channel: Channel, number: int | None = None) -> None:
        """Call off one of a channel's; without a `number` all of them."""
        for verification in self._wanted:
            if verification.channel is channel and number in (None, verification.request.id):
                verification.call_off()

    def close(self) -> None:
        for verification in self._wanted:
            verification.call_off()

    async def _run(self, verification: Verification) -> None:
        try:
            await self._judge(verification)
        finally:
            del self._wanted[verification]

    async def _judge(self, verification: Verification) -> None:
        request = verification.request
        try:
            await verification.run(self._thread)
        except SllmError as error:
            verification.refuse(error)
            if isinstance(error, InvalidCheckpoint):
                self._tell(Damaged(digest=request.digest, folder=request.folder, message=error.message))
        except Exception as error:
            log.exception("verifying %s failed by a defect of the store process", request.folder)
            verification.refuse(SllmError(f"the store process failed: {type(error).__name__}: {error}"))


class Verification:
    """One Verify."""

    def __init__(self, channel: Channel, request: Verify, quiet: Quiet) -> None:
        self.channel = channel
        self.request = request
        self._quiet = quiet
        self._called_off = False
        self._loop = asyncio.get_running_loop()
        self._progress: tuple[int, int] | None = None  # that is to be told

    def call_off(self) -> None:
        self._called_off = True
        self._quiet.notify()

    async def run(self, executor: Executor) -> None:
        """Verify, and say so. Raises what is wrong; Cancelled."""
        await self._loop.run_in_executor(executor, self._verify)
        self.channel.send(Verified(id=self.request.id))

    def refuse(self, error: SllmError) -> None:
        refused = Refused(id=self.request.id, reason=error.reason, message=error.message, hint=error.hint)
        self.channel.send(refused)

    def _verify(self) -> None:
        """In a thread."""
        if self._rest():
            raise Cancelled("it was called off before it began")
        folder = Path(self.request.folder)
        read_manifest(folder, digest=self.request.digest)
        verify(folder, deep=self.request.deep, progress=self._on_progress, cancelled=self._rest)

    def _rest(self) -> bool:
        """In a thread: wait while something is loaded; return whether it was called off."""
        self._quiet.wait(lambda: self._called_off)
        return self._called_off

    def _on_progress(self, done_bytes: int, total_bytes: int) -> None:
        """In a thread."""
        told, self._progress = self._progress is None, (done_bytes, total_bytes)
        if told:
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            message = Verifying(id=self.request.id, done_bytes=progress[0], total_bytes=progress[1])
            self.channel.send(message)
