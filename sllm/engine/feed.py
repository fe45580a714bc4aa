"""The engine host's end of a feed: follows which chunks of a grant are there, in a thread, for whoever waits for bytes.

The protocol is that of `sllm.core.grant`. A load that fails, or a store process that dies in the middle of one, is an
error in everybody who waits from then on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable

from sllm.core.grant import Grant
from sllm.errors import EngineFailed, SllmError, Unavailable, error_from

log = logging.getLogger(__name__)

_PACKET_BYTES = 64 << 10


def _nothing(first: int, end: int) -> None:
    """Stand for a callback that has nothing to do."""


class FeedReader:
    """Takes over `sock`. Nothing happens before `follow`.

    `arrive(first, end)` is called in the feed's thread when the chunks `first` to `end` are in the pool; it returns
    once they may count as being there. `settle(first, end)` is called after that, when nobody waits for it.
    """

    def __init__(
        self,
        grant: Grant,
        sock: socket.socket,
        *,
        arrive: Callable[[int, int], None] = _nothing,
        settle: Callable[[int, int], None] = _nothing,
    ) -> None:
        self._grant = grant
        self._sock = sock
        self._arrive = arrive
        self._settle = settle
        self._changed = threading.Condition()
        self._ready_chunks = 0
        self._error: SllmError | None = None
        self._tell: Callable[[float], None] = lambda share: None
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    @property
    def ready_bytes(self) -> int:
        """How many of the partition's bytes, from its first on, may be read."""
        return min(self._ready_chunks * self._grant.chunk_bytes, self._grant.size_bytes)

    def follow(self, tell: Callable[[float], None]) -> None:
        """Begin. `tell` is called, in the feed's thread, with the share (0..1) of the bytes that is there."""
        self._tell = tell
        self._thread.start()

    def wait(self, end: int) -> None:
        """Return once all bytes before `end` of the partition are there. Raises the error of the load."""
        if self.ready_bytes >= end:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self.ready_bytes >= end)
        if self.ready_bytes < end and self._error is not None:
            raise self._error

    def taken(self, chunks: int) -> None:
        """In a ring: the first `chunks` chunks are no longer needed where they are."""
        with contextlib.suppress(OSError):  # it has read all, or is dead: what it said last tells which
            self._sock.send(json.dumps({"taken": chunks}).encode())

    def advance(self, chunks: int) -> None:
        """Let the first `chunks` chunks count as being there."""
        with self._changed:
            self._ready_chunks = chunks
            self._changed.notify_all()
        self._tell(self.ready_bytes / max(1, self._grant.size_bytes))

    def _run(self) -> None:
        try:
            self._sock.setblocking(True)
            self._reach(self._grant.ready_chunks)
            while self._ready_chunks < self._grant.chunks:
                self._reach(self._receive())
        except SllmError as error:
            self._fail(error)
        except Exception as error:
            log.exception("following the weights failed")
            self._fail(EngineFailed(f"following the weights failed: {type(error).__name__}: {error}"))
        finally:
            self._arrive = self._settle = _nothing  # they know the memory, and would keep it mapped
            self._sock.close()

    def _receive(self) -> int:
        """Return how many chunks are in the pool."""
        try:
            packet = self._sock.recv(_PACKET_BYTES)
        except OSError:
            packet = b""
        if not packet:
            raise Unavailable("the store process ended while it read the weights", hint="start the replica again")
        message = json.loads(packet)
        if "error" in message:
            raise error_from(message["error"], message["message"], hint=message.get("hint", ""))
        return min(int(message["ready"]), self._grant.chunks)

    def _reach(self, chunks: int) -> None:
        first = self._ready_chunks
        if chunks > first:
            self._arrive(first, chunks)
            self.advance(chunks)
            self._settle(first, chunks)

    def _fail(self, error: SllmError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
