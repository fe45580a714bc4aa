"""The loads in time: who is granted what, what is read next, what is called off.

Belongs to one event loop, which only passes words; bytes move in the threads of ChunkReader.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sllm.agent.store import protocol
from sllm.agent.store.askers import Asker
from sllm.agent.store.content import Content
from sllm.agent.store.feed import Feed
from sllm.agent.store.load import Load, OpenSource
from sllm.agent.store.protocol import Open
from sllm.agent.store.queue import LoadingQueue
from sllm.agent.store.quiet import Quiet
from sllm.core.grant import POOL_BLOCK_BYTES
from sllm.core.priority import Priority
from sllm.errors import Cancelled, InvalidCheckpoint, PartitionMissing, SllmError, Unavailable
from sllm.failpoints import failpoint
from sllm.loader.folder import read_manifest
from sllm.loader.format import Manifest, Partition
from sllm.loader.memory.table import Entry

log = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE_S = 2.0  # with a ring whose reader takes nothing: then the next load begins beside it


class Loads:
    """`threads` read from what `open_source` opens. `awaited` has the generations of inherited entries that somebody
    waits for; `ask` asks anew for those who came too late for a load."""

    def __init__(
        self,
        content: Content,
        quiet: Quiet,
        *,
        threads: int,
        open_source: OpenSource,
        awaited: Callable[[], Container[int]],
        ask: Callable[[Asker], None],
    ) -> None:
        self._content = content
        self._quiet = quiet
        self._threads = threads
        self._open_source = open_source
        self._awaited = awaited
        self._ask = ask
        self._loads: dict[tuple[str, int], Load] = {}  # which may be joined: all but rings
        self._rings: list[Load] = []
        self._reads: set[asyncio.Task[None]] = set()
        self._queue: LoadingQueue[Load] = LoadingQueue()
        self._reading: Load | None = None  # whose turn it is
        # One for each load that can have memory, and for those about to get some, each of which has interrupted a less
        # urgent one: none waits for another.
        most = content.pool.size_bytes // POOL_BLOCK_BYTES + len(Priority)
        self._executor = ThreadPoolExecutor(most, thread_name_prefix="load")

    def grant(self, asker: Asker, entry: Entry) -> None:
        """Grant what is in memory, or is being read."""
        load = self._loads.get(entry.key)
        if load is not None and load.called_off:
            load.late.append(asker)
            return
        self._grant(asker, entry, load)
        if load is not None:
            self._raise(load, asker.request.priority)

    def begin(self, asker: Asker) -> None:
        """Join the load that has no memory yet, or begin one."""
        key = (asker.request.digest, asker.request.partition)
        load = self._loads.get(key)
        if load is None:
            self._loads[key] = load = Load(asker)
            self._queue.put(load, asker.request.priority)
            self._take_turns()
        else:
            load.askers.append(asker)
            self._raise(load, asker.request.priority)

    def raise_all(self, checkpoint: str, priority: int) -> None:
        """Let every load of a checkpoint go by a better priority, if it is one."""
        for load in (*self._loads.values(), *self._rings):
            if load.request.checkpoint == checkpoint:
                self._raise(load, priority)

    def forget(self, entry: Entry) -> None:
        """Let an entry that is being read go as soon as it is there."""
        for load in (*self._loads.values(), *self._rings):
            if load.entry is not None and load.entry.generation == entry.generation:
                load.forgotten = True

    def reconsider(self) -> None:
        """Call off what nobody wants any more."""
        for load in (*self._loads.values(), *self._rings):
            if not load.is_wanted and not load.called_off:
                self._call_off(load)

    def close(self) -> None:
        """Call everything off. Leases stay with who has them."""
        for load in (*self._loads.values(), *self._rings):
            self._queue.remove(load)
            load.call_off()
            for feed in load.feeds:
                feed.close()

    def _call_off(self, load: Load) -> None:
        load.call_off()
        if load.entry is None:
            del self._loads[load.key]  # who comes now begins another
            self._leave_queue(load)

    # --- turns ------------------------------------------------------------------------------

    def _raise(self, load: Load, priority: int) -> None:
        self._queue.raise_to(load, priority)
        self._take_turns()

    def _leave_queue(self, load: Load) -> None:
        """The next one may read. This one may go on beside it."""
        self._queue.remove(load)
        if self._reading is load:
            self._reading = None
        self._take_turns()

    def _take_turns(self) -> None:
        """Let whoever is first read, and whoever has read until now rest."""
        first = self._queue.first()
        self._quiet.set(first is None)
        if first is self._reading:
            return
        if self._reading is not None:
            self._reading.rest()
        self._reading = first
        if first is not None:
            first.go_on()
            self._begin_reading(first)

    def _begin_reading(self, load: Load) -> None:
        if not load.under_way:
            load.under_way = True
            work = asyncio.create_task(self._perform(load))
            self._reads.add(work)
            work.add_done_callback(self._reads.discard)

    # --- grants -----------------------------------------------------------------------------

    def _grant(self, asker: Asker, entry: Entry, load: Load | None) -> None:
        """Answer an asker whose chunks are there (`load` None), or will be."""
        failpoint("before-grant")
        try:
            lease = self._content.pool.lease(entry.extents)
            ours, theirs = _feed_pair(lease)
        except OSError as error:  # out of descriptors or locks
            asker.refuse(Unavailable(f"the pool cannot be leased: {error.strerror}"))
            return
        ready = entry.chunks if load is None else load.ready_chunks
        grant = protocol.Granted(id=asker.request.id, grant=protocol.grant_of(entry, ready))
        asker.answer(grant, (lease, theirs.detach()))
        failpoint("after-grant")
        if load is None:
            Feed(ours, lambda taken: None, lambda: None).finish(entry.chunks)
        else:
            self._follow(asker, load, ours)
        self._content.use(entry)  # last: the one who waits goes first. Where the memory lies has been told before.

    def _follow(self, asker: Asker, load: Load, sock: socket.socket) -> None:
        feed = Feed(sock, load.taken, self.reconsider)
        load.feeds.append(feed)
        feed.ready(load.ready_chunks)
        if asker.left_s is not None:
            feed.expire_after(asker.left_s, asker.too_late(), self.reconsider)

    # --- reading ----------------------------------------------------------------------------

    async def _perform(self, load: Load) -> None:
        try:
            manifest = await self._in_thread(_manifest_of, load.request)
            await self._room_for(load, manifest)
            entry = self._place(load, manifest)
            await self._read(load, entry, manifest.partitions[load.request.partition])
            self._end(load, entry)
        except SllmError as error:
            self._fail(load, error)
        except Exception as error:
            log.exception("a load failed by a defect of the store process")
            self._fail(load, SllmError(f"the store process failed: {type(error).__name__}: {error}"))
        finally:
            self._remove(load)
            self._leave_queue(load)
            for asker in load.late:
                self._ask(asker)

    async def _room_for(self, load: Load, manifest: Manifest) -> None:
        """Return when it is its turn, and there is room for all of it or nothing more will be given back for now.

        Memory of those that it has interrupted comes free only by their end: they go on first, if it is needed.
        """
        await load.turn.wait()
        while not load.called_off and not self._content.has_room(load.request, manifest, self._awaited()):
            if not self._queue.give_way(load):
                return
            self._take_turns()
            await load.turn.wait()

    def _place(self, load: Load, manifest: Manifest) -> Entry:
        """Take memory and answer who waits. Raises Unavailable, Cancelled."""
        if load.called_off:
            raise Cancelled("nobody wants it any more")
        load.entry = entry = self._content.take(load.request, manifest, self._awaited())
        askers, load.askers = [asker for asker in load.askers if asker.is_waiting], []
        if entry.is_ring:  # which has one reader: the others begin anew
            self._remove(load)
            self._rings.append(load)
            for asker in askers[1:]:
                self.begin(asker)
            askers = askers[:1]
        for asker in askers:
            self._grant(asker, entry, load)
        return entry

    async def _read(self, load: Load, entry: Entry, partition: Partition) -> None:
        def read() -> None:
            source = self._open_source(Path(load.request.folder) / partition.file, partition.size_bytes)
            load.read(self._content.pool, entry, source, partition.chunks, self._threads)

        watching = asyncio.create_task(self._watch(load)) if entry.is_ring else None
        try:
            await self._in_thread(read)
        finally:
            if watching is not None:
                watching.cancel()

    async def _watch(self, ring: Load) -> None:
        """End the turn of a ring whose reader takes nothing for a while, though it is full."""
        full_at = -1  # how many were taken when it was last seen to be full
        while not (ring.is_full and ring.taken_chunks == full_at and ring is self._reading):
            full_at = ring.taken_chunks if ring.is_full else -1
            await asyncio.sleep(_PATIENCE_S)
        log.warning("%s waits for its reader: the next load begins", ring.request.folder)
        self._leave_queue(ring)

    def _end(self, load: Load, entry: Entry) -> None:
        """All of it was read."""
        failpoint("after-read")
        read_s = load.read_s
        if entry.is_ring or load.forgotten:
            self._content.drop(entry)
        else:
            self._content.ready(entry, read_s)
        loaded = protocol.Loaded(
            checkpoint=load.request.checkpoint,
            size_bytes=entry.size_bytes,
            queue_s=time.monotonic() - load.since - read_s,
            read_s=read_s,
        )
        self._content.tell(loaded)
        load.finish(entry.chunks)

    def _fail(self, load: Load, error: SllmError) -> None:
        """Tell all who wait, and give the memory back."""
        digest, folder = load.request.digest, load.request.folder
        if not isinstance(error, Cancelled):
            log.error("%s is not loaded: %s", folder, error)
        if isinstance(error, InvalidCheckpoint):
            self._content.tell(protocol.Damaged(digest=digest, folder=folder, message=error.message))
        load.fail(error)
        if load.entry is not None:
            self._content.drop(load.entry)

    def _remove(self, load: Load) -> None:
        if self._loads.get(load.key) is load:
            del self._loads[load.key]
        if load in self._rings:
            self._rings.remove(load)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)


def _feed_pair(lease: int) -> tuple[socket.socket, socket.socket]:
    """Make the two ends of a feed; without one the lease is closed too. Raises OSError."""
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        os.close(lease)
        raise


def _manifest_of(request: Open) -> Manifest:
    """Return the manifest of what is asked for. Raises what `read_manifest` does; takes up to 20 ms."""
    manifest = read_manifest(Path(request.folder), digest=request.digest)
    if not 0 <= request.partition < len(manifest.partitions):
        raise PartitionMissing(f"{request.folder} has no partition {request.partition}")
    return manifest
