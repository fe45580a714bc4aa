"""The supervisor's end of systemd's readiness protocol (`sllm.lifecycle.notify` is the other)."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_MAX_BYTES = 4096

Listener = Callable[[dict[str, str]], None]


class Notifications:
    """One socket for all children. What a process says about itself is told to whoever listens for its pid.

    The socket's name is abstract: no file is left behind, and a long state folder is no problem. The kernel says
    who sent a message, so that no other process can claim that a child is ready.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        name = f"sllm-{os.urandom(12).hex()}"
        self._socket.bind(f"\0{name}")
        self.address = f"@{name}"
        self._listeners: dict[int, Listener] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read)

    def listen(self, pid: int, listener: Listener) -> None:
        """Call `listener` with the fields of each message of process `pid`."""
        self._listeners[pid] = listener

    def forget(self, pid: int) -> None:
        self._listeners.pop(pid, None)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        space = socket.CMSG_SPACE(_CREDENTIALS.size)
        content, ancillary, _, _ = self._socket.recvmsg(_MAX_BYTES, space)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid, _, _ = _CREDENTIALS.unpack(data)
                listener = self._listeners.get(pid)
                if listener is not None:
                    listener(parse(content))


def parse(content: bytes) -> dict[str, str]:
    """Return the fields of one message; lines that are none are left out."""
    lines = content.decode(errors="replace").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)
