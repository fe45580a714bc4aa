"""One end of a connection between agent and store process: messages and descriptors in and out, without waiting."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from sllm.agent.store.protocol import MAX_PACKET_BYTES, Malformed, Message, decode, encode

log = logging.getLogger(__name__)

_MAX_FDS = 3
_MAX_WAITING = 4096  # messages; who reads so slowly is gone
_MAX_LARGE_BYTES = 64 << 20
_LARGE = b"{}"  # the message is in the first descriptor


class Channel:
    """Takes over `sock`. `on_message` gets each message with its descriptors, which are its own to close; `on_end` is
    called once, when the other end is gone or does not speak the protocol."""

    def __init__(
        self, sock: socket.socket, on_message: Callable[[Message, list[int]], None], on_end: Callable[[], None]
    ) -> None:
        self._sock = sock
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self._receive)

    @property
    def closed(self) -> bool:
        return self._closed

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send, or queue; nothing is called back from here. The descriptors are taken over, and closed once they are
        sent or cannot be."""
        packet = encode(message)
        if len(packet) > MAX_PACKET_BYTES:
            packet, fds = _LARGE, (memfd_with("sllm-message", packet), *fds)
        self._waiting.append((packet, tuple(fds)))
        if self._closed:
            self._discard()
        elif len(self._waiting) == 1:
            self._flush()
        elif len(self._waiting) == _MAX_WAITING:
            log.error("the other end does not read what it is sent: the connection is closed")
            self._loop.call_soon(self.end)

    def close(self) -> None:
        """Close this end; `on_end` is not called."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._discard()

    def end(self) -> None:
        """Close this end, as if the other one had."""
        if not self._closed:
            self.close()
            self._on_end()

    def _flush(self) -> None:
        self._loop.remove_writer(self._sock)
        while self._waiting:
            packet, fds = self._waiting[0]
            try:
                socket.send_fds(self._sock, [packet], fds)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self._loop.call_soon(self.end)
                return
            self._waiting.popleft()
            close_all(fds)

    def _discard(self) -> None:
        while self._waiting:
            close_all(self._waiting.popleft()[1])

    def _receive(self) -> None:
        try:
            packet, fds, flags, _ = socket.recv_fds(self._sock, MAX_PACKET_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            packet, fds, flags = b"", [], 0
        if not packet:
            close_all(fds)
            self.end()
            return
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise Malformed("a packet that is too large")
            message = decode(_large(fds) if packet == _LARGE else packet)
        except Malformed as error:
            log.warning("the other end does not speak the protocol: %s", error)
            close_all(fds)
            self.end()
            return
        self._on_message(message, fds)


def _large(fds: list[int]) -> bytes:
    """Return the message in the first descriptor, which is taken from the list. Raises Malformed."""
    if not fds:
        raise Malformed("a large message without its descriptor")
    fd = fds.pop(0)
    try:
        size_bytes = os.fstat(fd).st_size
        if size_bytes > _MAX_LARGE_BYTES:
            raise Malformed(f"a message of {size_bytes} bytes")
        return os.pread(fd, size_bytes, 0)
    except OSError as error:
        raise Malformed(f"a large message that cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def memfd_with(name: str, content: bytes) -> int:
    """Return a descriptor of memory that holds `content`."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
