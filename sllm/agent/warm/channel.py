"""The agent's end of the socket to a warm process: requests and answers, matched by nonce."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

from sllm.agent.warm.base import HostFds
from sllm.core.launch import Launch, WarmReady
from sllm.errors import EngineFailed, InvalidConfiguration, SllmError

_PACKET_BYTES = 1 << 18


class Channel:
    """Takes over `sock`, which its owner closes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[WarmReady] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._forks: dict[str, asyncio.Future[int]] = {}
        sock.setblocking(False)
        self._loop.add_reader(sock, self._on_packet)

    async def ready(self) -> WarmReady:
        """Raises EngineFailed if the process ends before it is ready."""
        return await asyncio.shield(self._ready)

    async def closed(self) -> None:
        await asyncio.shield(self._closed)

    def fork(self, launch: Launch, fds: HostFds) -> asyncio.Future[int]:
        """Ask for an engine host; the answer is its pid, or EngineFailed.

        The descriptors are sent when this returns: the caller may close them.
        """
        answer: asyncio.Future[int] = self._loop.create_future()
        launch_fd = _as_memfd(launch)
        try:
            packet = json.dumps({"fork": launch.nonce}).encode()
            socket.send_fds(self._sock, [packet], [launch_fd, *fds])
        except OSError as error:
            raise EngineFailed(f"the warm process cannot be asked to fork: {error.strerror}") from error
        finally:
            os.close(launch_fd)
        self._forks[launch.nonce] = answer
        return answer

    def _on_packet(self) -> None:
        try:
            packet = self._sock.recv(_PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet:
            self._take(json.loads(packet))
        else:
            self.close()

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            about = message["ready"]
            self._ready.set_result(WarmReady(**{**about, "architectures": tuple(about["architectures"])}))
            return
        if message.get("nonce") == "":
            hint = "is the engine installed? (extra `cpu` or `gpu`)"
            _fail(self._ready, InvalidConfiguration(f"this node cannot run its engine: {message['error']}", hint=hint))
            return
        answer = self._forks.pop(message.get("forked") or message.get("nonce", ""), None)
        if answer is None:
            return
        if "forked" in message:
            answer.set_result(message["pid"])
        else:
            answer.set_exception(EngineFailed(f"the warm process could not fork: {message['error']}"))

    def close(self) -> None:
        """Stop listening, and fail what waits for an answer."""
        if self._closed.done():
            return
        self._loop.remove_reader(self._sock)
        self._closed.set_result(None)
        gone = EngineFailed("the warm process died", hint="it is started again; so will be the replica")
        _fail(self._ready, gone)
        for answer in self._forks.values():
            _fail(answer, gone)


def _fail(waiting: asyncio.Future[Any], error: SllmError) -> None:
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # seen, also when nobody waits


def _as_memfd(launch: Launch) -> int:
    fd = os.memfd_create("sllm-launch", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(launch.to_json().encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
