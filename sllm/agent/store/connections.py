"""The agents that a store process serves: usually one, for a moment two when one takes over from another."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable

from sllm.agent.store.channel import Channel
from sllm.agent.store.protocol import Message

log = logging.getLogger(__name__)

_ACCEPT_AGAIN_S = 1.0  # after a connection could not be accepted
_UCRED = struct.Struct("@iII")  # pid, uid, gid: SO_PEERCRED, unix(7)


class Connections:
    """Calls `on_message` with each message and its descriptors, `on_lost` when an agent is gone, and `on_alone` when
    there has been none for `grace_s`."""

    def __init__(
        self,
        *,
        grace_s: float,
        on_message: Callable[[Channel, Message, list[int]], None],
        on_lost: Callable[[Channel], None],
        on_alone: Callable[[], None],
    ) -> None:
        self._grace_s = grace_s
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_alone = on_alone
        self._loop = asyncio.get_running_loop()
        self._clients: list[Channel] = []
        self._greeted: list[Channel] = []
        self._listener: socket.socket | None = None
        self._alone: asyncio.TimerHandle | None = None
        self._feel_alone()

    def listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._loop.add_reader(listener, self._accept)

    def accept(self, sock: socket.socket) -> None:
        """Serve a connected socket, unless another user is at its other end."""
        uid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
        if uid != os.geteuid():
            log.warning("a connection of user %d is refused", uid)
            sock.close()
            return
        client = Channel(sock, lambda message, fds: self._on_message(client, message, fds), lambda: self._lose(client))
        self._clients.append(client)
        if self._alone is not None:
            self._alone.cancel()

    def greet(self, client: Channel, holdings: Message, welcome: Message, pool_fd: int) -> None:
        """Tell an agent what there is; from now on it hears what `tell` says."""
        client.send(holdings)
        client.send(welcome, (pool_fd,))
        self._greeted.append(client)

    def tell(self, message: Message) -> None:
        """Say something to all. Nothing is called back from here."""
        for client in self._greeted:
            client.send(message)

    def close(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
        if self._alone is not None:
            self._alone.cancel()
        for client in self._clients:
            client.close()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # it is gone again, or there are no descriptors left
            log.warning("a connection cannot be accepted: %s", error.strerror)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_ACCEPT_AGAIN_S, self.listen, self._listener)
            return
        self.accept(sock)

    def _lose(self, client: Channel) -> None:
        self._clients.remove(client)
        if client in self._greeted:
            self._greeted.remove(client)
        self._on_lost(client)
        self._feel_alone()

    def _feel_alone(self) -> None:
        if not self._clients:
            self._alone = self._loop.call_later(self._grace_s, self._on_alone)
