"""The store process' decisions in time: who is granted what, what is read next, what goes.

Belongs to one event loop, which only passes words; bytes move in the threads of ChunkReader.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from pathlib import Path

from sllm.agent.store import protocol
from sllm.agent.store.channel import Channel, close_all
from sllm.agent.store.checking import FolderCheck
from sllm.agent.store.connections import Connections
from sllm.agent.store.feed import Feed
from sllm.agent.store.inherited import is_intact
from sllm.agent.store.load import Asker, Load, OpenSource
from sllm.agent.store.protocol import Abandon, Check, Forget, Hello, Message, Open, Quit
from sllm.agent.store.queue import LoadingQueue
from sllm.errors import (
    Cancelled,
    CapacityExceeded,
    DeadlineExceeded,
    InvalidCheckpoint,
    ManifestCorrupt,
    PartitionMissing,
    SllmError,
    Unavailable,
)
from sllm.failpoints import failpoint
from sllm.loader.folder import read_manifest
from sllm.loader.format import Manifest
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import Entry, EntryState, Table
from sllm.loader.storage.direct import DirectFile

log = logging.getLogger(__name__)

_RING_SLOTS = 8  # chunks in flight of a partition that has no room: enough for all reading threads, twice over
_PATIENCE_S = 2.0  # with a ring whose reader takes nothing: then the next load begins beside it


class Server:
    """`quit` is set when an agent says so, or when none has been there for `grace_s`. `threads` read from what
    `open_source` opens."""

    def __init__(
        self,
        pool: SharedPool,
        table: Table,
        *,
        threads: int,
        grace_s: float,
        open_source: OpenSource = DirectFile,
    ) -> None:
        self.quit = asyncio.Event()
        self._pool = pool
        self._table = table
        self._threads = threads
        self._grace_s = grace_s
        self._open_source = open_source
        self._loop = asyncio.get_running_loop()
        self._connections = Connections(
            grace_s=grace_s, on_message=self._take, on_lost=self._lose, on_alone=self._give_up
        )
        self._loads: dict[tuple[str, int], Load] = {}  # which may be joined: all but rings
        self._rings: list[Load] = []
        self._reads: set[asyncio.Task[None]] = set()
        self._queue: LoadingQueue[Load] = LoadingQueue()
        self._queued = asyncio.Event()
        self._idle = threading.Event()  # nothing is loaded, nothing waits to be
        self._idle.set()
        self._checks: dict[FolderCheck, asyncio.Task[None]] = {}
        self._until_verified: dict[int, list[Asker]] = {}  # by generation

    # --- connections ------------------------------------------------------------------------

    def listen(self, listener: socket.socket) -> None:
        self._connections.listen(listener)

    def accept(self, sock: socket.socket) -> None:
        """Serve a connected socket, unless another user is at its other end."""
        self._connections.accept(sock)

    def close(self) -> None:
        """Call everything off. Leases stay with who has them."""
        for load in (*self._loads.values(), *self._rings):
            load.call_off()
            for feed in load.feeds:
                feed.close()
        for check in self._checks:
            check.call_off()
        self._connections.close()

    def _take(self, client: Channel, message: Message, fds: list[int]) -> None:
        close_all(fds)  # no message of an agent has any
        match message:
            case Hello():
                self._greet(client)
            case Open():
                self._open(Asker(channel=client, request=message, since=time.monotonic()))
            case Abandon():
                self._abandon(client, message.id)
            case Forget():
                self._forget(message.digest)
            case Check():
                self._begin_check(client, message)
            case Quit():
                self.quit.set()
            case _:
                log.warning("an agent sent %s, which is ours to send", type(message).__name__)
                client.end()

    def _lose(self, client: Channel) -> None:
        for load in (*self._loads.values(), *self._rings):
            self._leave(load, [asker for asker in load.askers if asker.channel is client])
        for askers in self._until_verified.values():
            askers[:] = [asker for asker in askers if asker.channel is not client]
        for check in self._checks:
            if check.channel is client:
                check.call_off()

    def _give_up(self) -> None:
        log.warning("no agent for %g s: the pool is given up", self._grace_s)
        self.quit.set()

    def _greet(self, client: Channel) -> None:
        entries = [protocol.Holds(entry=entry.as_json()) for entry in self._table.entries]
        welcome = protocol.Welcome(
            release=protocol.RELEASE, size_bytes=self._pool.size_bytes, huge=self._pool.huge, pid=os.getpid()
        )
        self._connections.greet(client, entries, welcome, os.dup(self._pool.fd))

    def _tell(self, message: Message) -> None:
        self._connections.tell(message)

    # --- what an agent asks -----------------------------------------------------------------

    def _open(self, asker: Asker) -> None:
        entry = self._table.find(asker.request.digest, asker.request.partition)
        if entry is not None and entry.state is EntryState.VERIFYING:
            self._until_verified.setdefault(entry.generation, []).append(asker)
        elif entry is None:
            self._await(asker)
        elif (load := self._loads.get(entry.key)) is not None and load.called_off:
            load.late.append(asker)
        else:
            self._grant(asker, entry, load)

    def _await(self, asker: Asker) -> None:
        """Join the load that has no memory yet, or begin one."""
        key = (asker.request.digest, asker.request.partition)
        load = self._loads.get(key)
        if load is None:
            self._loads[key] = load = Load(asker)
            self._queue.put(load, asker.request.priority)
            self._queued.set()
        else:
            load.askers.append(asker)
            self._queue.raise_to(load, asker.request.priority)
        if asker.request.deadline_s > 0:
            self._loop.call_later(asker.request.deadline_s, self._expire, load, asker)

    def _expire(self, load: Load, asker: Asker) -> None:
        if asker in load.askers:
            asker.refuse(_too_late(asker))
            self._leave(load, [asker])

    def _abandon(self, client: Channel, number: int) -> None:
        def meant(asker: Asker) -> bool:
            return asker.channel is client and asker.request.id == number

        for load in tuple(self._loads.values()):
            self._leave(load, [asker for asker in load.askers if meant(asker)])
        for askers in self._until_verified.values():
            askers[:] = [asker for asker in askers if not meant(asker)]
        for check in self._checks:
            if check.channel is client and check.request.id == number:
                check.call_off()

    def _leave(self, load: Load, askers: list[Asker]) -> None:
        if askers:
            load.askers = [asker for asker in load.askers if asker not in askers]
            self._reconsider(load)

    def _reconsider(self, load: Load) -> None:
        """Call a load off that nobody wants any more."""
        if load.is_wanted or load.called_off:
            return
        load.call_off()
        if self._loads.get(load.key) is load and load.entry is None:
            del self._loads[load.key]  # who comes now begins another
            self._queue.remove(load)

    def _forget(self, digest: str) -> None:
        for entry in self._table.entries:
            if entry.digest == digest and entry.state is EntryState.READY and not self._pool.leased(entry.extents):
                self._drop(entry)

    def _begin_check(self, client: Channel, request: Check) -> None:
        check = FolderCheck(client, request, self._idle)
        self._checks[check] = asyncio.create_task(self._check(check))

    async def _check(self, check: FolderCheck) -> None:
        try:
            found = await check.run()
        finally:
            del self._checks[check]
        if found is not None:
            self._damaged(found[0], check.request.folder, found[1])

    # --- grants -----------------------------------------------------------------------------

    def _grant(self, asker: Asker, entry: Entry, load: Load | None) -> None:
        """Answer an asker whose chunks are there (`load` None), or will be."""
        failpoint("before-grant")
        try:
            lease = self._pool.lease(entry.extents)
            ours, theirs = _feed_pair(lease)
        except OSError as error:  # out of descriptors or locks
            asker.refuse(Unavailable(f"the pool cannot be leased: {error.strerror}"))
            return
        ready = entry.chunks if load is None else load.ready_chunks
        grant = protocol.Granted(id=asker.request.id, grant=protocol.grant_of(entry, ready))
        asker.channel.send(grant, (lease, theirs.detach()))
        failpoint("after-grant")
        if load is None:
            Feed(ours, lambda taken: None, lambda: None).finish(entry.chunks)
        else:
            self._follow(asker, load, ours)
        # Last: the one who waits goes first. Where the memory lies has been told before.
        self._tell(protocol.Holds(entry=self._table.use(entry.generation, time.monotonic()).as_json()))

    def _follow(self, asker: Asker, load: Load, sock: socket.socket) -> None:
        feed = Feed(sock, load.taken, lambda: self._reconsider(load))
        load.feeds.append(feed)
        feed.ready(load.ready_chunks)
        if asker.request.deadline_s > 0:
            left_s = asker.since + asker.request.deadline_s - time.monotonic()
            feed.expire_after(max(0.0, left_s), _too_late(asker), lambda: self._reconsider(load))

    # --- loads ------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever: verify what was inherited, read what is wanted."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._verify_all())
            tasks.create_task(self._perform_all())

    async def _perform_all(self) -> None:
        while True:
            load = self._queue.pop()
            if load is None:
                self._idle.set()
                self._queued.clear()
                await self._queued.wait()
            else:
                self._idle.clear()
                await self._turn(load)

    async def _turn(self, load: Load) -> None:
        """Return when the next load may begin: after this one, unless it is held up by the reader of a ring."""
        work = asyncio.create_task(self._perform(load))
        self._reads.add(work)
        work.add_done_callback(self._reads.discard)
        while not work.done():
            before = load.ready_chunks
            await asyncio.wait({work}, timeout=_PATIENCE_S)
            if load in self._rings and load.ready_chunks == before and not work.done():
                log.warning("%s waits for its reader: the next load begins", load.request.folder)
                return

    async def _perform(self, load: Load) -> None:
        began = time.monotonic()
        try:
            manifest = await asyncio.to_thread(_manifest_of, load.request)
            self._place(load, manifest)
            await self._read(load, manifest, began)
        except SllmError as error:
            self._fail(load, error)
        except Exception as error:
            log.exception("a load failed by a defect of the store process")
            self._fail(load, SllmError(f"the store process failed: {type(error).__name__}: {error}"))
        finally:
            if self._loads.get(load.key) is load:
                del self._loads[load.key]
            if load in self._rings:
                self._rings.remove(load)
            for asker in load.late:
                self._open(asker)

    def _place(self, load: Load, manifest: Manifest) -> None:
        """Take memory and answer who waits. Raises CapacityExceeded, Cancelled."""
        if load.called_off:
            raise Cancelled("nobody wants it any more")
        size_bytes = manifest.partitions[load.request.partition].size_bytes
        chunks = -(-size_bytes // manifest.chunk_bytes)
        load.entry = entry = self._allocate(load.request, size_bytes, manifest.chunk_bytes, chunks)
        askers, load.askers = load.askers, []
        if entry.is_ring:  # which has one reader: the others begin anew
            del self._loads[load.key]
            self._rings.append(load)
            for asker in askers[1:]:
                self._await(asker)
            askers = askers[:1]
        for asker in askers:
            self._grant(asker, entry, load)

    def _allocate(self, request: Open, size_bytes: int, chunk_bytes: int, chunks: int) -> Entry:
        now, leased = time.monotonic(), self._pool.leased
        slots, victims = chunks, self._table.victims(size_bytes, now, leased)
        if victims is None:
            slots = self._table.ring_slots(chunk_bytes, min(_RING_SLOTS, chunks), now, leased)
            victims = self._table.victims(slots * chunk_bytes, now, leased) if slots else None
        if victims is None:
            raise CapacityExceeded(
                f"all {self._pool.size_bytes} bytes of the pool are in use",
                hint="stop replicas on this node, or give it a larger pool: [store] dram_bytes",
            )
        for victim in victims:
            self._drop(victim)
            failpoint("in-evict")
        entry = self._table.add(
            digest=request.digest,
            partition=request.partition,
            checkpoint=request.checkpoint,
            folder=request.folder,
            size_bytes=size_bytes,
            chunk_bytes=chunk_bytes,
            slots=slots,
            now=now,
        )
        self._tell(protocol.Holds(entry=entry.as_json()))
        return entry

    async def _read(self, load: Load, manifest: Manifest, began: float) -> None:
        assert load.entry is not None
        partition = manifest.partitions[load.request.partition]
        path = Path(load.request.folder) / partition.file
        source = await asyncio.to_thread(self._open_source, path, partition.size_bytes)
        await asyncio.to_thread(load.read, self._pool, load.entry, source, partition.chunks, self._threads)
        failpoint("after-read")
        read_s = time.monotonic() - began
        if load.entry.is_ring:
            self._drop(load.entry)
        else:
            self._tell(protocol.Holds(entry=self._table.ready(load.entry.generation, read_s).as_json()))
        loaded = protocol.Loaded(
            checkpoint=load.request.checkpoint,
            size_bytes=load.entry.size_bytes,
            queue_s=began - load.since,
            read_s=read_s,
        )
        self._tell(loaded)
        load.finish(load.entry.chunks)

    def _fail(self, load: Load, error: SllmError) -> None:
        """Tell all who wait, and give the memory back."""
        if not isinstance(error, Cancelled):
            log.error("%s is not loaded: %s", load.request.folder, error)
        if isinstance(error, InvalidCheckpoint):
            self._damaged(load.request.digest, load.request.folder, error)
        load.fail(error)
        if load.entry is not None:
            self._drop(load.entry)

    def _damaged(self, digest: str, folder: str, error: SllmError) -> None:
        self._tell(protocol.Damaged(digest=digest, folder=folder, reason=error.reason, message=error.message))

    def _drop(self, entry: Entry) -> None:
        self._table.drop(entry.generation, self._pool.leased)
        self._tell(protocol.Gone(generation=entry.generation))

    # --- what was inherited -----------------------------------------------------------------

    async def _verify_all(self) -> None:
        while (entry := self._next_to_verify()) is not None:
            failpoint("in-adopt")
            intact = await asyncio.to_thread(is_intact, self._pool, entry, self._threads)
            if self._table.get(entry.generation) is not None:
                if intact:
                    self._tell(protocol.Holds(entry=self._table.ready(entry.generation).as_json()))
                else:
                    log.error("the pool's copy of %s is not what was read: it is dropped", entry.folder)
                    self._drop(entry)
            for asker in self._until_verified.pop(entry.generation, ()):
                self._open(asker)

    def _next_to_verify(self) -> Entry | None:
        """Those first that somebody waits for."""
        waiting = [entry for entry in self._table.entries if entry.state is EntryState.VERIFYING]
        return min(waiting, key=lambda entry: not self._until_verified.get(entry.generation), default=None)


def _feed_pair(lease: int) -> tuple[socket.socket, socket.socket]:
    """Make the two ends of a feed; without one the lease is closed too. Raises OSError."""
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        os.close(lease)
        raise


def _manifest_of(request: Open) -> Manifest:
    """Return the manifest of what is asked for. Raises what `read_manifest` does; takes up to 20 ms."""
    manifest = read_manifest(Path(request.folder))
    if manifest.digest != request.digest:
        raise ManifestCorrupt(f"{request.folder} holds another content than {request.digest}")
    if not 0 <= request.partition < len(manifest.partitions):
        raise PartitionMissing(f"{request.folder} has no partition {request.partition}")
    return manifest


def _too_late(asker: Asker) -> DeadlineExceeded:
    return DeadlineExceeded(f"{asker.request.folder} was not loaded within {asker.request.deadline_s:g} s")
