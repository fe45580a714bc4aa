"""Checkpoints, users of grants, and store processes to ask."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import xxhash

from sllm.agent.changes import Changes
from sllm.agent.children import Children
from sllm.agent.store.client import Granted, StoreClient, Wanted
from sllm.agent.store.fake import FakeStore
from sllm.agent.store.process import StoreOptions, StoreProcess
from sllm.agent.store.protocol import Damaged, Loaded
from sllm.core.grant import POOL_BLOCK_BYTES, Grant
from sllm.linux import start_ticks
from sllm.loader.format import Manifest, Partition, Tensor, parse, to_bytes
from sllm.loader.memory.table import Entry
from sllm.loader.storage.fake import FakeSource

MIB = 1 << 20
_TURNS = 200  # of the loop: more than any test has messages under way


@dataclass(frozen=True)
class Made:
    """A checkpoint on disk."""

    folder: Path
    manifest: Manifest
    data: bytes

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def file(self) -> Path:
        return self.folder / "partition-000.bin"

    def wanted(self, **changes: Any) -> Wanted:
        values: dict[str, Any] = {"digest": self.digest, "checkpoint": self.digest, "folder": str(self.folder)}
        return Wanted(**{**values, **changes})


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Made]:
    def make(name: str = "demo", size_bytes: int = 4 * MIB, chunk_bytes: int = MIB) -> Made:
        folder, data = tmp_path / name, os.urandom(size_bytes)
        folder.mkdir()
        hashes = (xxhash.xxh3_64_hexdigest(data[at : at + chunk_bytes]) for at in range(0, size_bytes, chunk_bytes))
        partition = Partition(
            file="partition-000.bin",
            size_bytes=size_bytes,
            sha256=hashlib.sha256(data).hexdigest(),
            chunks=tuple(hashes),
        )
        manifest = Manifest(
            partitions=(partition,),
            tensors={"w": Tensor(0, 0, size_bytes, "uint8", (size_bytes,), (1,))},
            chunk_bytes=chunk_bytes,
        )
        content = to_bytes(manifest)
        (folder / "manifest.json").write_bytes(content)
        made = Made(folder, parse(content), data)
        made.file.write_bytes(data)
        return made

    return make


def content_of(granted: Granted) -> bytes:
    """Return what a lease shows, without a ring's order."""
    grant = granted.grant
    whole = b"".join(os.pread(granted.lease_fd, extent.size_bytes, extent.offset) for extent in grant.extents)
    return whole[: grant.size_bytes]


class Feed:
    """Takes over the feed of a grant, until the end of the test at the latest."""

    _open: ClassVar[list[socket.socket]] = []

    def __init__(self, granted: Granted) -> None:
        self.sock = socket.socket(fileno=granted.feed_fd)
        self._open.append(self.sock)
        self.sock.setblocking(False)

    async def next(self) -> dict[str, Any] | None:
        """Return the next message; None at the end."""
        async with asyncio.timeout(30):
            packet = await asyncio.get_running_loop().sock_recv(self.sock, 4096)
        return json.loads(packet) if packet else None

    async def all(self) -> list[dict[str, Any]]:
        with self.sock:
            messages = []
            while (message := await self.next()) is not None:
                messages.append(message)
            return messages

    def taken(self, chunks: int) -> None:
        with suppress(BrokenPipeError):  # all has been read meanwhile
            self.sock.send(json.dumps({"taken": chunks}).encode())

    @classmethod
    def close_all(cls) -> None:
        while cls._open:
            cls._open.pop().close()


@pytest.fixture(autouse=True)
def _feeds() -> Iterator[None]:
    yield
    Feed.close_all()


async def copied_out(granted: Granted, feed: Feed) -> bytes:
    """Read a ring as it comes."""
    grant, data, done = granted.grant, b"", 0
    while done < grant.chunks:
        message = await feed.next()
        assert message is not None
        for chunk in range(done, message["ready"]):
            data += _chunk(granted, grant, chunk)
        done = message["ready"]
        if done < grant.chunks:
            feed.taken(done)
    return data[: grant.size_bytes]


def _chunk(granted: Granted, grant: Grant, chunk: int) -> bytes:
    offset = chunk % grant.slots * grant.chunk_bytes
    number, within = divmod(offset, POOL_BLOCK_BYTES)
    places = [extent.offset + at for extent in grant.extents for at in range(0, extent.size_bytes, POOL_BLOCK_BYTES)]
    return os.pread(granted.lease_fd, grant.chunk_bytes, places[number] + within)


@dataclass
class Recorder:
    """Hears what a store process says of its own accord."""

    changes: Changes = field(default_factory=Changes)
    loads: list[Loaded] = field(default_factory=list)
    damages: list[Damaged] = field(default_factory=list)

    def changed(self) -> None:
        self.changes.notify()

    def loaded(self, loaded: Loaded) -> None:
        self.loads.append(loaded)
        self.changes.notify()

    def damaged(self, damaged: Damaged) -> None:
        self.damages.append(damaged)
        self.changes.notify()

    async def until(self, true: Callable[[], Any], within_s: float = 30.0) -> None:
        async with asyncio.timeout(within_s):
            while not true():
                await self.changes.wait_beyond(self.changes.revision)


class Disk:
    """Opens partitions as FakeSource. `hold` lets no read of a folder go on until `free` says so; `begun` has the
    folder of each read, in order."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.opens: list[str] = []  # a folder that is read again is here again
        self.begun: list[str] = []
        self.sources: dict[str, FakeSource] = {}
        self.faults: dict[str, dict[str, Any]] = {}
        self._held: dict[str, threading.Event] = {}
        self.reading = Changes()
        self._loop = asyncio.get_running_loop()

    def hold(self, made: Made) -> None:
        self._held[made.folder.name] = threading.Event()

    def free(self, made: Made) -> None:
        self._held[made.folder.name].set()

    def fail(self, made: Made, **faults: Any) -> None:
        """`faults` are keywords of FakeSource."""
        self.faults[made.folder.name] = faults

    async def until_read(self, made: Made) -> None:
        """Wait until the first read of a folder has begun."""
        async with asyncio.timeout(30):
            while made.folder.name not in self.opened:
                await self.reading.wait_beyond(self.reading.revision)

    def free_all(self) -> None:
        for gate in self._held.values():
            gate.set()

    def open(self, path: Path, size_bytes: int) -> FakeSource:
        name = path.parent.name
        self.opens.append(name)

        def wait(offset: int) -> None:
            self.begun.append(name)
            gate = self._held.get(name)
            self._loop.call_soon_threadsafe(self._note, name)
            assert gate is None or gate.wait(30)

        source = FakeSource(path.read_bytes(), name=path.name, gate=wait, **self.faults.get(name, {}))
        self.sources[name] = source
        return source

    def _note(self, name: str) -> None:
        if name not in self.opened:
            self.opened.append(name)
        self.reading.notify()


@dataclass
class StoreInTest:
    """A store in this process, with a disk that does as it is told."""

    store: FakeStore
    client: StoreClient
    recorder: Recorder
    disk: Disk

    @property
    def entries(self) -> list[Entry]:
        return list(self.store.entries)

    async def load(self, made: Made, **changes: Any) -> Granted:
        """Have a checkpoint granted and wait until it is all there."""
        granted = await self.client.open(made.wanted(**changes))
        assert (await Feed(granted).all())[-1] == {"ready": granted.grant.chunks}
        return granted

    async def settled(self) -> None:
        """Return when the server has heard all that was said or closed before: it is in this loop, and hears one
        message of a connection each turn."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    def verify(
        self, made: Made, progress: Callable[[int, int], None] = lambda done, total: None, **changes: Any
    ) -> asyncio.Task[None]:
        values: dict[str, Any] = {"digest": made.digest, "folder": str(made.folder), "progress": progress}
        return asyncio.create_task(self.client.verify(**{**values, **changes}))

    def begin(self, made: Made, **changes: Any) -> asyncio.Task[Granted]:
        return asyncio.create_task(self.client.open(made.wanted(**changes)))


@pytest.fixture
async def make_store() -> AsyncIterator[Callable[..., Any]]:
    """Return a coroutine function that makes a store of so many blocks of the pool; keywords are FakeStore's."""
    async with AsyncExitStack() as stack:

        async def make(chunks: int = 4, threads: int = 1, **changes: Any) -> StoreInTest:
            disk, recorder = Disk(), Recorder()
            store = FakeStore(chunks * POOL_BLOCK_BYTES, threads=threads, open_source=disk.open, **changes)
            store.start(recorder)
            stack.push_async_callback(store.close, stop=True)
            stack.callback(disk.free_all)
            return StoreInTest(store, await store.client(), recorder, disk)

        yield make


@dataclass
class ProcessInTest:
    """A real store process, and the agent's side of it. `environment` is that of the next process."""

    process: StoreProcess
    recorder: Recorder
    environment: dict[str, str]
    log_path: Path

    async def client(self) -> StoreClient:
        async with asyncio.timeout(30):
            return await self.process.client()

    @property
    def entries(self) -> list[Entry]:
        return list(self.process.entries)

    async def load(self, made: Made) -> Granted:
        granted = await (await self.client()).open(made.wanted())
        assert (await Feed(granted).all())[-1] == {"ready": granted.grant.chunks}
        return granted

    @property
    def pid(self) -> int:
        return int((self.log_path.parent / "store.pid").read_text().split()[0])

    def kill(self) -> None:
        """End one that was left running."""
        with suppress(OSError):
            pid, ticks = map(int, (self.log_path.parent / "store.pid").read_text().split())
            if start_ticks(pid) == ticks:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def children() -> Iterator[Children]:
    return Children()


@pytest.fixture
async def make_process(tmp_path: Path, children: Children) -> AsyncIterator[Callable[..., ProcessInTest]]:
    """Return a function that makes the agent's side of a store process; keywords are fields of StoreOptions."""
    made: list[ProcessInTest] = []

    def make(*, failpoint: str = "", chunks: int = 4, folder: str = "run", **changes: Any) -> ProcessInTest:
        environment = {"SLLM_FAILPOINT": failpoint}
        values: dict[str, Any] = {
            "size_bytes": chunks * POOL_BLOCK_BYTES,
            "any_size": False,
            "hugepages": False,
            "prefault": False,
            "lock": False,
            "threads": 2,
            "grace_s": 20.0,
            "environment": environment,
        }
        run = tmp_path / folder
        run.mkdir(parents=True, exist_ok=True)
        log_path, recorder = run / "store.log", Recorder()
        process = StoreProcess(StoreOptions(**{**values, **changes}), run, log_path, tmp_path / "scratch", children)
        process.start(recorder)
        made.append(ProcessInTest(process, recorder, environment, log_path))
        return made[-1]

    yield make
    for each in made:
        await each.process.close(stop=True)
        each.kill()
