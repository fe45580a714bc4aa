"""Checkpoints coming to this node and leaving it. One copy at a time, in the order asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from sllm.agent.changes import Changes
from sllm.agent.threads import run_cancellable
from sllm.agent.weights import Weights
from sllm.core.ids import CheckpointName, ReplicaId, checkpoint_name
from sllm.errors import Conflict, UnsupportedCheckpoint
from sllm.loader.source import Source, examine, locate
from sllm.loader.store import SsdStore, StoredCheckpoint
from sllm.rpc.agents import AddProgress

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Adding:
    """A copy under way. It goes on when nobody watches it."""

    source: str
    done_bytes: int = 0
    total_bytes: int = 0
    changes: Changes = field(default_factory=Changes)
    task: asyncio.Task[StoredCheckpoint] | None = None


class Checkpoints:
    """`architectures` waits for what the engine serves (empty: anything); `using` says which replicas need a digest."""

    def __init__(
        self,
        store: SsdStore,
        weights: Weights,
        roots: Sequence[Path],
        *,
        architectures: Callable[[], Awaitable[tuple[str, ...]]],
        using: Callable[[str], tuple[ReplicaId, ...]],
        on_change: Callable[[], None],
    ) -> None:
        self._store = store
        self._weights = weights
        self._roots = roots
        self._architectures = architectures
        self._using = using
        self._on_change = on_change
        self._adding: dict[CheckpointName, _Adding] = {}
        self._removing: set[CheckpointName] = set()
        self._turn = asyncio.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def add(self, name: CheckpointName, source: str) -> AsyncIterator[AddProgress]:
        """Yield progress; the last has the checkpoint. The same name and source again joins the work under way."""
        if name in self._removing:
            raise Conflict(f"checkpoint {name!r} is being removed", hint="wait until it is gone")
        adding = self._adding.get(checkpoint_name(name)) or self._begin(name, source)
        if adding.source != source:
            raise Conflict(f"checkpoint {name!r} is being added from {adding.source}")
        assert adding.task is not None
        while not adding.task.done():
            seen = adding.changes.revision
            yield AddProgress(done_bytes=adding.done_bytes, total_bytes=adding.total_bytes)
            await adding.changes.wait_beyond(seen)
        entry = await asyncio.shield(adding.task)
        total = max(adding.total_bytes, adding.done_bytes)
        yield AddProgress(done_bytes=total, total_bytes=total, checkpoint=entry.checkpoint)

    async def remove(self, name: CheckpointName) -> None:
        """Return when its files are gone. Raises NotFound, Conflict."""
        if name in self._adding:
            raise Conflict(f"checkpoint {name!r} is being added", hint="wait until it is there")
        digest = self._store.named(name).checkpoint.digest
        users = self._using(digest)
        if users:
            raise Conflict(f"checkpoint {name!r} is used by replica {users[0]}", hint="delete its deployment first")
        # Out of the store before anything is waited for: a start that comes meanwhile finds none.
        entry = self._store.withdraw(name)
        self._removing.add(name)
        try:
            await asyncio.to_thread(self._store.discard, entry)
        finally:
            self._removing.discard(name)
        if all(entry.checkpoint.digest != digest for entry in self._store.entries()):
            self._weights.forget(digest)
        log.info("checkpoint %s is removed", name)
        self._on_change()

    async def close(self) -> None:
        """Call off what is being added; nothing of it stays on disk."""
        tasks = [adding.task for adding in self._adding.values() if adding.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._writer.shutdown(wait=False)

    def _begin(self, name: CheckpointName, source: str) -> _Adding:
        adding = _Adding(source=source)
        adding.task = asyncio.create_task(self._add(name, adding), name=f"add {name}")
        adding.task.add_done_callback(lambda task: self._on_end(name, adding, task))
        self._adding[name] = adding
        return adding

    def _on_end(self, name: CheckpointName, adding: _Adding, task: asyncio.Task[StoredCheckpoint]) -> None:
        del self._adding[name]
        if not task.cancelled():
            task.exception()  # seen, also when nobody watches
        adding.changes.notify()
        self._on_change()

    async def _add(self, name: CheckpointName, adding: _Adding) -> StoredCheckpoint:
        loop = asyncio.get_running_loop()

        def show(done_bytes: int, total_bytes: int) -> None:
            adding.done_bytes, adding.total_bytes = done_bytes, total_bytes
            adding.changes.notify()

        def look(_: Event) -> Source:
            return examine(locate(adding.source, self._roots), self._roots)

        def copy(cancel: Event) -> StoredCheckpoint:
            def progress(done_bytes: int, total_bytes: int) -> None:
                loop.call_soon_threadsafe(show, done_bytes, total_bytes)

            return self._store.add(
                name, source, adding.source, now=time.time(), progress=progress, cancelled=cancel.is_set
            )

        async with self._turn:
            source = await run_cancellable(self._writer, look)
            check_architecture(source, await self._architectures())
            entry = await run_cancellable(self._writer, copy)
        log.info("checkpoint %s is here: %d bytes, %s", name, entry.checkpoint.size_bytes, entry.checkpoint.digest)
        return entry


def check_architecture(source: Source, known: tuple[str, ...]) -> None:
    """Raises UnsupportedCheckpoint."""
    if source.facts is None:
        return  # the store refuses it
    wanted = source.facts.architecture
    if known and wanted not in known:
        raise UnsupportedCheckpoint(
            f"the engine of this node does not know the architecture {wanted!r}",
            hint="see the list of supported models of the installed vLLM",
        )
