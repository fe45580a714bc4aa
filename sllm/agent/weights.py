"""The weights of this node's checkpoints in memory: grants of them from the store process, and what it has to tell.

The bytes themselves never come here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from sllm.agent.inventory import InMemory
from sllm.agent.store.base import StoreRunner
from sllm.agent.store.client import Died, Granted, StoreClient, Wanted
from sllm.agent.store.protocol import Damaged, Loaded
from sllm.core.node import LoadReport
from sllm.core.priority import Priority
from sllm.core.residency import Tier, TierUsage
from sllm.core.runtime_layout import CHECKPOINT
from sllm.errors import DeadlineExceeded, SllmError
from sllm.loader.memory.table import Entry, EntryState
from sllm.loader.runtime_layouts import RuntimeLayout
from sllm.loader.store import SsdStore, StoredCheckpoint

log = logging.getLogger(__name__)

T = TypeVar("T")

_KEPT_LOADS = 16
_FEED_BYTES = 4096  # longer than any packet of a feed
_ATTEMPTS = 3  # of asking, when the store process dies before it answers


class Weights:
    """Belongs to the event loop. `on_change`: what the pool holds changed, or a load has ended."""

    def __init__(self, process: StoreRunner, store: SsdStore, on_change: Callable[[], None]) -> None:
        self._process = process
        self._store = store
        self._on_change = on_change
        self._loads: deque[LoadReport] = deque(maxlen=_KEPT_LOADS)
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._asks: set[_Ask] = set()  # that have no answer yet
        process.start(self)

    @asynccontextmanager
    async def granted(
        self,
        stored: StoredCheckpoint | RuntimeLayout,
        *,
        partition: int = 0,
        priority: Priority = Priority.REQUEST,
        deadline_s: float = 0.0,
    ) -> AsyncIterator[Granted]:
        """Grant a partition: its bytes are in memory, or on their way, as the feed tells (sllm.core.grant).

        Comes when the load's turn in the queue has come; leaving closes both descriptors, after which whoever has got
        copies of them still holds the memory. Raises InvalidCheckpoint, DeadlineExceeded, Unavailable (while
        all of the pool is in use, too).
        """
        granted = await self._open(self._wanted(stored, partition, priority, deadline_s))
        try:
            yield granted
        finally:
            granted.close()

    def raise_to(self, checkpoint: str, priority: Priority) -> None:
        """Let what is loaded of a checkpoint (its digest), in whatever layout, go by this priority, if that is better.
        Nothing under way is no error."""
        for ask in self._asks:
            ask.raise_to(checkpoint, priority)
        if self._process.is_there:
            self._spawn(lambda: self._raise(checkpoint, priority), f"the load of {checkpoint} is not raised")

    def prefetch(
        self, stored: StoredCheckpoint | RuntimeLayout, *, partition: int = 0, instead_of: Sequence[str] = ()
    ) -> None:
        """Have it in memory when it may soon be wanted; checkpoints in `instead_of` (by digest) leave it first. Returns
        at once; a failure is only logged."""
        wanted = self._wanted(stored, partition, Priority.PREFETCH, 0.0)
        self._spawn(lambda: self._prefetch(wanted, instead_of), f"{wanted.folder} is not prefetched")

    async def verify(
        self, stored: StoredCheckpoint, progress: Callable[[int, int], None], *, deep: bool = False
    ) -> None:
        """Verify a checkpoint's files on SSD, whenever nothing is loaded; `progress` gets done and total bytes.

        Raises the InvalidCheckpoint that says what is wrong.
        """
        digest, folder = stored.manifest.digest, str(self._store.folder(stored))
        await self._asked(lambda client: client.verify(digest, folder, progress, deep=deep))

    def forget(self, digest: str) -> None:
        """Free the memory of a checkpoint that is gone, in all its layouts."""
        if self._process.is_there:
            digests = {entry.digest for entry in self._entries if entry.checkpoint == digest}
            self._spawn(lambda: self._forget(digests), f"the memory of {digest} is not freed")

    @property
    def loads(self) -> tuple[LoadReport, ...]:
        """The last loads, the oldest first."""
        return tuple(self._loads)

    @property
    def usage(self) -> TierUsage:
        used_bytes = sum(entry.held_bytes for entry in self._entries) + self._process.kept_back_bytes
        return TierUsage(tier=Tier.DRAM, capacity_bytes=self._process.size_bytes, used_bytes=used_bytes)

    @property
    def in_memory(self) -> tuple[InMemory, ...]:
        """What the pool holds, by checkpoint: ready if one of its layouts is."""
        by_checkpoint: dict[str, list[Entry]] = {}
        for entry in self._entries:
            by_checkpoint.setdefault(entry.checkpoint, []).append(entry)
        return tuple(
            InMemory(
                digest=digest,
                size_bytes=sum(entry.size_bytes for entry in entries),
                ready=self._process.is_there and _is_ready(entries),
            )
            for digest, entries in by_checkpoint.items()
        )

    async def close(self, *, stop: bool) -> None:
        """Leave the store process running, or `stop` it."""
        for task in self._tasks:
            task.cancel()
        await self._process.close(stop=stop)

    # --- what the store process says --------------------------------------------------------

    def changed(self) -> None:
        self._on_change()

    def loaded(self, loaded: Loaded) -> None:
        self._count += 1
        report = LoadReport(
            number=self._count,
            digest=loaded.checkpoint,
            size_bytes=loaded.size_bytes,
            tier=Tier.SSD,
            queue_s=loaded.queue_s,
            read_s=loaded.read_s,
        )
        self._loads.append(report)
        self._on_change()

    def damaged(self, damaged: Damaged) -> None:
        """Use a copy no more whose bytes are not what was written."""
        self._spawn(lambda: self._withdraw(damaged), f"{damaged.folder} is damaged, and stays in use")

    # ----------------------------------------------------------------------------------------

    @property
    def _entries(self) -> tuple[Entry, ...]:
        return self._process.entries

    def _wanted(
        self, stored: StoredCheckpoint | RuntimeLayout, partition: int, priority: Priority, deadline_s: float
    ) -> Wanted:
        digest = stored.manifest.digest
        if isinstance(stored, RuntimeLayout):
            folder, checkpoint = stored.folder, stored.manifest.key.get(CHECKPOINT, digest)
        else:
            folder, checkpoint = self._store.folder(stored), digest
        return Wanted(
            digest=digest,
            checkpoint=checkpoint,
            folder=str(folder),
            partition=partition,
            priority=priority,
            deadline_s=deadline_s,
        )

    async def _open(self, wanted: Wanted) -> Granted:
        """The deadline is kept here too: there may be no store process to keep it."""
        ask = _Ask(wanted)
        self._asks.add(ask)
        try:
            async with asyncio.timeout(wanted.deadline_s or None):
                return await self._asked(lambda client: client.open(ask.wanted))
        except TimeoutError as error:
            raise DeadlineExceeded(f"{wanted.folder} was not loaded within {wanted.deadline_s:g} s") from error
        finally:
            self._asks.discard(ask)

    async def _asked(self, question: Callable[[StoreClient], Awaitable[T]]) -> T:
        """Ask the store process, and if it dies the next one. Raises Died when that goes on."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return await question(await self._process.client())
            except Died as error:
                log.warning("%s: it is asked again", error)
        return await question(await self._process.client())

    def _spawn(self, work: Callable[[], Awaitable[None]], otherwise: str) -> None:
        """Do something that nobody waits for. `otherwise` says in the log what it means if it fails."""
        task = asyncio.create_task(_logged(work, otherwise))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _withdraw(self, damaged: Damaged) -> None:
        await asyncio.to_thread(_withdraw, self._store, damaged)
        self._on_change()

    async def _prefetch(self, wanted: Wanted, instead_of: Sequence[str]) -> None:
        if instead_of:
            await self._forget({entry.digest for entry in self._entries if entry.checkpoint in instead_of})
        granted = await self._open(wanted)
        if granted.grant.is_ring:  # too little memory to keep it, and nobody to take it out
            granted.close()
            return
        os.close(granted.lease_fd)  # it may go again before anybody wants it
        await _fed(granted.feed_fd)

    async def _raise(self, checkpoint: str, priority: Priority) -> None:
        (await self._process.client()).raise_to(checkpoint, priority)

    async def _forget(self, digests: set[str]) -> None:
        client = await self._process.client()
        for digest in digests:
            client.forget(digest)


class _Ask:
    """What is asked of a store process, and of the next one if that dies: at the priority that it has got by then."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted

    def raise_to(self, checkpoint: str, priority: Priority) -> None:
        if self.wanted.checkpoint == checkpoint and priority < self.wanted.priority:
            self.wanted = replace(self.wanted, priority=priority)


async def _logged(work: Callable[[], Awaitable[None]], otherwise: str) -> None:
    try:
        await work()
    except (SllmError, OSError) as error:
        log.error("%s: %s", otherwise, error)


def _withdraw(store: SsdStore, damaged: Damaged) -> None:
    """Put a checkpoint in quarantine, or remove a runtime layout, if it is still the one that is damaged. Blocking."""
    place = damaged.digest, damaged.folder
    for stored in store.entries():
        if (stored.manifest.digest, str(store.folder(stored))) == place:
            log.error("checkpoint %s is put in quarantine: %s", stored.checkpoint.name, damaged.message)
            store.quarantine(stored)
    for layout in store.runtimes():
        if (layout.manifest.digest, str(layout.folder)) == place:
            log.error("runtime layout %s is removed: %s", layout.folder.name, damaged.message)
            store.drop_runtime(layout.manifest.key)


def _is_ready(entries: list[Entry]) -> bool:
    """True if the whole of one layout is there."""
    unready = {entry.digest for entry in entries if entry.state is not EntryState.READY or entry.is_ring}
    return any(entry.digest not in unready for entry in entries)


async def _fed(feed_fd: int) -> None:
    """Keep a feed open, which keeps its load wanted, until it ends; and close it."""
    loop = asyncio.get_running_loop()
    with socket.socket(fileno=feed_fd) as feed:
        feed.setblocking(False)
        while await loop.sock_recv(feed, _FEED_BYTES):
            pass
