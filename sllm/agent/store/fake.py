"""A store without a process: the same server in the agent's own event loop. For tests of what is above it."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress

from sllm.agent.store.client import Listener, StoreClient
from sllm.agent.store.inherited import IsIntact
from sllm.agent.store.load import OpenSource
from sllm.agent.store.server import Server
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import Entry, Table
from sllm.loader.storage.direct import DirectFile


class FakeStore:
    """Reads real files, or what `open_source` says, into a real, small pool; or into that of the one `before`, which it
    takes over as it does what that one held. `is_silent`: whoever asks for it now waits for ever."""

    def __init__(
        self,
        size_bytes: int = 64 << 20,
        *,
        threads: int = 2,
        open_source: OpenSource = DirectFile,
        before: FakeStore | None = None,
        is_intact: IsIntact | None = None,
    ) -> None:
        self.is_silent = False
        if before is None:
            self._pool = SharedPool.create(size_bytes, hugepages=False)
        else:
            self._pool = SharedPool.adopt(os.dup(before._pool.fd))
        self._inherited = before.entries if before else ()
        self._threads = threads
        self._open_source = open_source
        self._is_intact = is_intact
        self._client: StoreClient | None = None
        self._server: Server | None = None
        self._work: asyncio.Task[None] | None = None

    @property
    def size_bytes(self) -> int:
        return self._pool.size_bytes

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._client.entries.values()) if self._client else ()

    @property
    def kept_back_bytes(self) -> int:
        return self._client.kept_back_bytes if self._client else 0

    @property
    def is_there(self) -> bool:
        return self._client is not None

    def start(self, listener: Listener) -> None:
        generation = time.time_ns() // 1000
        self._server = Server(
            self._pool,
            Table.adopt(self._pool.size_bytes, generation, self._inherited, self._pool.leased),
            threads=self._threads,
            grace_s=60.0,
            open_source=self._open_source,
            is_intact=self._is_intact,
        )
        self._work = asyncio.create_task(self._server.run())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.accept(theirs)
        self._client = StoreClient(ours, listener)

    async def client(self) -> StoreClient:
        assert self._client is not None
        if self.is_silent:
            await asyncio.Future()
        await self._client.welcome()
        return self._client

    async def close(self, *, stop: bool) -> None:
        if self._client is None or self._server is None or self._work is None:
            return
        self._client.close()
        self._server.close()
        self._work.cancel()
        with suppress(asyncio.CancelledError):
            await self._work
