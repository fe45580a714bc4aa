"""The store process' end of a feed: how one user of a grant learns which chunks are there (sllm.core.grant)."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import suppress

from sllm.errors import SllmError

_MAX_PACKET_BYTES = 4096
_MAX_TEXT = 1000  # of an error's message: a packet must fit


class Feed:
    """Takes over `sock`. `on_taken(n)` is called when the user of a ring has copied n chunks out; `on_gone` once, when
    no copy of the other end is left, unless the feed has ended before."""

    def __init__(self, sock: socket.socket, on_taken: Callable[[int], None], on_gone: Callable[[], None]) -> None:
        self._sock = sock
        self._on_taken = on_taken
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._unsent: bytes | None = None  # only the last word counts: one that reads slowly skips some
        self._ready = 0
        self._ended = False
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock, self._receive)

    @property
    def over(self) -> bool:
        return self._ended or self._closed

    def expire_after(self, seconds: float, error: SllmError, on_expired: Callable[[], None]) -> None:
        """Fail the feed then, if it has not ended before."""

        def expire() -> None:
            if not self.over:
                self.fail(error)
                on_expired()

        self._timer = self._loop.call_later(seconds, expire)

    def ready(self, chunks: int) -> None:
        """Say that the first `chunks` chunks are there, unless that is known."""
        if chunks > self._ready:
            self._ready = chunks
            self._say({"ready": chunks})

    def finish(self, chunks: int) -> None:
        """Say that all are there, and close."""
        self.ready(chunks)
        self._end()

    def fail(self, error: SllmError) -> None:
        """Say that the rest will not come, and close."""
        text = {"message": error.message[:_MAX_TEXT], "hint": error.hint[:_MAX_TEXT]}
        self._say({"error": error.reason, **text})
        self._end()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._drain()
            self._sock.close()

    def _say(self, message: dict[str, object]) -> None:
        if not self.over:
            self._unsent = json.dumps(message).encode()
            self._flush()

    def _end(self) -> None:
        """Close once the last word is sent."""
        self._ended = True
        self._flush()

    def _flush(self) -> None:
        if self._closed:
            return
        self._loop.remove_writer(self._sock)
        if self._unsent is not None:
            try:
                self._sock.send(self._unsent)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self._loop.call_soon(self._lose)  # not here: whoever speaks is in the middle of something
                return
            self._unsent = None
        if self._ended:
            self.close()

    def _receive(self) -> None:
        try:
            packet = self._sock.recv(_MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        taken = _taken(packet)
        if taken is None:  # gone, or not who we think
            self._lose()
        else:
            self._on_taken(taken)

    def _drain(self) -> None:
        """Let nothing unread behind: closing would be an error at the other end, which hides our last word from it."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)  # nothing more can come
            while self._sock.recv(_MAX_PACKET_BYTES):
                pass

    def _lose(self) -> None:
        if not self._closed:
            ended = self._ended
            self.close()
            if not ended:
                self._on_gone()


def _taken(packet: bytes) -> int | None:
    try:
        taken = json.loads(packet)["taken"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return taken if type(taken) is int else None
