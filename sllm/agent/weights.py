"""The loading queue: checkpoints from SSD into the DRAM pool, one read at a time, first come first served.

What is in the pool already bypasses the queue. Starts that want the same checkpoint share one read, which is cancelled
when the last of them goes away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from threading import Event

from sllm.agent.threads import run_cancellable
from sllm.errors import InvalidCheckpoint
from sllm.loader.manifest import Manifest, layout
from sllm.loader.memory import region
from sllm.loader.memory.pool import Pool, Region
from sllm.loader.store import SsdStore

log = logging.getLogger(__name__)

# Called with the done share (0..1) of the read, from 0.0 when it begins.
Listener = Callable[[float], None]
_REPORT_STEP = 0.01


@dataclass(slots=True, eq=False)
class _Load:
    listeners: list[Listener] = field(default_factory=list)
    progress: float | None = None  # None: it waits for its turn
    task: asyncio.Task[Region] | None = None

    def tell(self, progress: float) -> None:
        self.progress = progress
        for listener in self.listeners:
            listener(progress)


class Weights:
    """Belongs to the event loop; only the reading itself is in a thread. `on_change`: what the pool holds changed."""

    def __init__(self, pool: Pool, store: SsdStore, on_change: Callable[[], None]) -> None:
        self.pool = pool
        self._store = store
        self._on_change = on_change
        self._turn = asyncio.Lock()  # its waiters are served in order
        self._loads: dict[str, _Load] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="load")

    @asynccontextmanager
    async def pinned(self, manifest: Manifest, listener: Listener) -> AsyncIterator[Region]:
        """Hold a checkpoint in memory, reading it first if need be. Raises InvalidCheckpoint, CapacityExceeded."""
        held = self.pool.find(manifest.checkpoint.digest)
        if held is not None and held.ready:
            self.pool.pin(held, time.monotonic())
        else:
            held = await self._loaded(manifest, listener)
        try:
            yield held
        finally:
            self.pool.unpin(held, time.monotonic())
            self._on_change()

    def forget(self, digest: str) -> None:
        """Drop a checkpoint that nothing uses."""
        held = self.pool.find(digest)
        if held is not None and held.ready and held.pins == 0:
            self.pool.drop(held)
            self._on_change()

    def close(self) -> None:
        self._reader.shutdown(wait=False)
        self.pool.close()

    async def _loaded(self, manifest: Manifest, listener: Listener) -> Region:
        digest = manifest.checkpoint.digest
        load = self._loads.get(digest) or self._begin(manifest)
        assert load.task is not None
        load.listeners.append(listener)
        if load.progress is not None:
            listener(load.progress)
        try:
            held = await asyncio.shield(load.task)
            self.pool.pin(held, time.monotonic())
            return held
        finally:
            load.listeners.remove(listener)
            if not load.listeners:
                await self._end(digest, load, load.task)

    def _begin(self, manifest: Manifest) -> _Load:
        load = _Load()
        load.task = asyncio.create_task(self._load(load, manifest))
        self._loads[manifest.checkpoint.digest] = load
        return load

    async def _end(self, digest: str, load: _Load, task: asyncio.Task[Region]) -> None:
        if self._loads.get(digest) is load:
            del self._loads[digest]
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            self.pool.unpin(task.result(), time.monotonic())  # the load's own pin

    async def _load(self, load: _Load, manifest: Manifest) -> Region:
        async with self._turn:
            entries, size_bytes = layout(manifest.tensors)
            held = self.pool.reserve(manifest.checkpoint.digest, entries, size_bytes, time.monotonic())
            load.tell(0.0)
            self._on_change()
            try:
                await self._read(load, manifest, held)
            except BaseException:
                self.pool.drop(held)
                raise
            finally:
                self._on_change()
            return held

    async def _read(self, load: _Load, manifest: Manifest, held: Region) -> None:
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        reported = 0.0

        def progress(done_bytes: int) -> None:  # in a reading thread, one at a time
            nonlocal reported
            share = done_bytes / max(1, manifest.checkpoint.size_bytes)
            if share - reported >= _REPORT_STEP:
                reported = share
                loop.call_soon_threadsafe(load.tell, share)

        def read(cancel: Event) -> None:
            self._store.check(manifest)
            chunks = tuple(region.reads(manifest.tensors, held.tensors))
            region.fill(held.fd, self._store.folder(manifest), chunks, progress=progress, cancelled=cancel.is_set)

        try:
            await run_cancellable(self._reader, read)
        except InvalidCheckpoint as error:
            log.error("checkpoint %s is damaged: %s", manifest.checkpoint.name, error)
            self._store.quarantine(manifest)
            raise
        held.ready = True
        held.reload_s = time.monotonic() - began
