"""Memory that was inherited: is it still what its manifest says? Nothing else tells whether a process that died, or one
that outlived it, has written there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from sllm.agent.store.askers import Asker
from sllm.agent.store.content import Content
from sllm.agent.store.load import places
from sllm.errors import SllmError
from sllm.failpoints import failpoint
from sllm.loader.folder import read_manifest
from sllm.loader.format import Partition
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import Entry, EntryState

log = logging.getLogger(__name__)

IsIntact = Callable[[SharedPool, Entry, int], bool]  # (pool, entry, threads): takes its time


class Inherited:
    """Verifies the entries that count as VERIFYING. `is_intact` says whether one may be used; `ask` asks anew for those
    who have waited for it."""

    def __init__(
        self, content: Content, *, threads: int, ask: Callable[[Asker], None], is_intact: IsIntact | None = None
    ) -> None:
        self._content = content
        self._threads = threads
        self._ask = ask
        self._is_intact = is_intact or compare
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inherited")  # the loop would wait for its own
        self._askers: dict[int, list[Asker]] = {}  # by generation

    @property
    def awaited(self) -> Container[int]:
        """The generations that somebody waits for."""
        return {generation for generation, askers in self._askers.items() if any(asker.is_waiting for asker in askers)}

    def wait(self, asker: Asker, entry: Entry) -> None:
        """Let one wait until an entry is verified."""
        self._askers.setdefault(entry.generation, []).append(asker)

    async def verify_all(self) -> None:
        while (entry := self._next()) is not None:
            failpoint("in-adopt")
            intact = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._is_intact, self._content.pool, entry, self._threads
            )
            if self._content.table.get(entry.generation) is not None:  # it may have made room meanwhile
                self._settle(entry, intact)
            self._ask_again(entry)

    def forget(self, entry: Entry) -> None:
        self._content.drop(entry)
        self._ask_again(entry)

    def _ask_again(self, entry: Entry) -> None:
        for asker in self._askers.pop(entry.generation, ()):
            self._ask(asker)

    def _settle(self, entry: Entry, intact: bool) -> None:
        if intact:
            self._content.ready(entry)
        else:
            log.error("the pool's copy of %s is not what was read: it is dropped", entry.folder)
            self._content.drop(entry)

    def _next(self) -> Entry | None:
        """Those first that somebody waits for."""
        awaited = self.awaited
        left = [entry for entry in self._content.table.entries if entry.state is EntryState.VERIFYING]
        return min(left, key=lambda entry: entry.generation not in awaited, default=None)


def compare(pool: SharedPool, entry: Entry, threads: int) -> bool:
    """Compare every chunk with the manifest on SSD. False if that is gone. Takes its time: give it a thread."""
    try:
        partition = _partition_of(entry)
    except (SllmError, IndexError) as error:
        log.warning("%s cannot be verified: %s", entry.folder, error)
        return False
    if partition is None or len(partition.chunks) != entry.chunks:
        return False
    place = places(pool, entry)

    def is_whole(chunk: int) -> bool:
        length = min(entry.chunk_bytes, entry.size_bytes - chunk * entry.chunk_bytes)
        return xxhash.xxh3_64_hexdigest(place(chunk)[:length]) == partition.chunks[chunk]

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as executor:
        return all(executor.map(is_whole, range(entry.chunks)))


def _partition_of(entry: Entry) -> Partition | None:
    manifest = read_manifest(Path(entry.folder), digest=entry.digest)
    partition = manifest.partitions[entry.partition]
    same = (manifest.chunk_bytes, partition.size_bytes) == (entry.chunk_bytes, entry.size_bytes)
    return partition if same else None
