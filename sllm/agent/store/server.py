"""What the store process does with each message of an agent, and what happens to it when that agent goes.

The work is in `loads`, `inherited` and `verification`; all of them belong to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket

from sllm.agent.store import protocol
from sllm.agent.store.askers import Asker, Askers
from sllm.agent.store.channel import Channel, close_all
from sllm.agent.store.connections import Connections
from sllm.agent.store.content import Content
from sllm.agent.store.inherited import Inherited, IsIntact
from sllm.agent.store.load import OpenSource
from sllm.agent.store.loads import Loads
from sllm.agent.store.protocol import Abandon, Forget, Hello, Message, Open, Ping, Pong, Quit, Raise, Verify
from sllm.agent.store.quiet import Quiet
from sllm.agent.store.verification import Verifications
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import EntryState, Table
from sllm.loader.storage.direct import DirectFile

log = logging.getLogger(__name__)


class Server:
    """`quit` is set when an agent says so, or when none has been there for `grace_s`; `keeps` tells then whether the
    pool will be taken over. `threads` read from what
    `open_source` opens; `is_intact` says whether memory that was inherited may be used."""

    def __init__(
        self,
        pool: SharedPool,
        table: Table,
        *,
        threads: int,
        grace_s: float,
        open_source: OpenSource = DirectFile,
        is_intact: IsIntact | None = None,
    ) -> None:
        self.quit = asyncio.Event()
        self.keeps = False
        self._grace_s = grace_s
        self._connections = Connections(
            grace_s=grace_s, on_message=self._take, on_lost=self._lose, on_alone=self._give_up
        )
        quiet = Quiet()
        self._content = Content(pool, table, self._connections.tell)
        self._verifications = Verifications(quiet, self._connections.tell)
        self._inherited = Inherited(self._content, threads=threads, ask=self._open, is_intact=is_intact)
        self._loads = Loads(
            self._content,
            quiet,
            threads=threads,
            open_source=open_source,
            awaited=lambda: self._inherited.awaited,
            ask=self._open,
        )
        self._askers = Askers(self._loads.reconsider)

    def listen(self, listener: socket.socket) -> None:
        self._connections.listen(listener)

    def accept(self, sock: socket.socket) -> None:
        """Serve a connected socket, unless another user is at its other end."""
        self._connections.accept(sock)

    async def run(self) -> None:
        """For ever: verify what was inherited. What is wanted is read meanwhile."""
        await self._inherited.verify_all()
        await asyncio.Future()

    def close(self) -> None:
        """Call everything off. Leases stay with who has them."""
        self._askers.close()
        self._loads.close()
        self._verifications.close()
        self._connections.close()

    def _take(self, client: Channel, message: Message, fds: list[int]) -> None:
        close_all(fds)  # no message of an agent has any
        match message:
            case Hello():
                self._greet(client)
            case Open():
                self._open(self._askers.add(client, message))
            case Abandon():
                self._leave(client, message.id)
            case Forget():
                self._forget(message.digest)
            case Raise():
                self._askers.raise_all(message.checkpoint, message.priority)
                self._loads.raise_all(message.checkpoint, message.priority)
            case Verify():
                self._verifications.begin(client, message)
            case Ping():
                self._content.look()
                client.send(Pong())
            case Quit():
                self.keeps = message.keep
                self.quit.set()
            case _:
                log.warning("an agent sent %s, which is ours to send", type(message).__name__)
                client.end()

    def _lose(self, client: Channel) -> None:
        self._leave(client, None)

    def _leave(self, client: Channel, number: int | None) -> None:
        """Call off what has this number, or all that an agent asked for."""
        self._askers.leave(client, number)
        self._verifications.leave(client, number)

    def _give_up(self) -> None:
        log.warning("no agent for %g s: the pool is given up", self._grace_s)
        self.quit.set()

    def _greet(self, client: Channel) -> None:
        pool, table = self._content.pool, self._content.table
        welcome = protocol.Welcome(
            release=protocol.RELEASE, size_bytes=pool.size_bytes, huge=pool.huge, pid=os.getpid()
        )
        holdings = protocol.Holdings(
            entries=[entry.as_json() for entry in table.entries], kept_back_bytes=table.kept_back_bytes
        )
        self._connections.greet(client, holdings, welcome, os.dup(pool.fd))

    def _open(self, asker: Asker) -> None:
        """Answer at once, or when what is asked for is verified or has memory."""
        if not asker.is_waiting:
            return
        entry = self._content.table.find(asker.request.digest, asker.request.partition)
        if entry is None:
            self._loads.begin(asker)
        elif entry.state is EntryState.VERIFYING:
            self._inherited.wait(asker, entry)
        else:
            self._loads.grant(asker, entry)

    def _forget(self, digest: str) -> None:
        forget = {
            EntryState.LOADING: self._loads.forget,
            EntryState.VERIFYING: self._inherited.forget,
            EntryState.READY: self._content.drop,
        }
        for entry in self._content.table.entries:
            if entry.digest == digest:
                forget[entry.state](entry)
