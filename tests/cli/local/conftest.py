"""Stand-in programs: tiny processes that tell the test when they start and stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

# Connects to the test, says who it is, says READY to its supervisor; the connection breaks when it ends.
PRELUDE = """
import os, signal, socket, sys
def notify(*fields):
    path = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto("\\n".join(fields).encode(), "\\0" + path[1:])
def hello(name):
    line = socket.create_connection(("127.0.0.1", int(os.environ["STAND_IN_PORT"])))
    line.sendall(f"{name} {os.getpid()}\\n".encode())
    signal.signal(signal.SIGTERM, lambda *_: (line.sendall(b"stopping\\n"), sys.exit(0)))
    return line
"""


@dataclass
class Met:
    """A stand-in that said hello."""

    name: str
    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def says(self) -> str:
        return (await self.reader.readline()).decode().strip()

    async def ends(self) -> None:
        with suppress(ConnectionError):
            while await self.reader.read(100):
                pass


@dataclass
class Meetings:
    """Where stand-ins say hello, in the order in which they do."""

    met: asyncio.Queue[Met] = field(default_factory=asyncio.Queue)
    all: list[Met] = field(default_factory=list)

    async def hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name, pid = (await reader.readline()).decode().split()
        met = Met(name, int(pid), reader, writer)
        self.all.append(met)
        await self.met.put(met)

    async def next(self) -> Met:
        async with asyncio.timeout(30):
            return await self.met.get()


@pytest.fixture
async def meetings(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Meetings]:
    """Where stand-ins say hello; those still there at the end of the test are killed."""
    found = Meetings()
    server = await asyncio.start_server(found.hear, "127.0.0.1", 0)
    monkeypatch.setenv("STAND_IN_PORT", str(server.sockets[0].getsockname()[1]))
    yield found
    for met in found.all:
        if not met.reader.at_eof():
            with suppress(ProcessLookupError):
                os.kill(met.pid, signal.SIGKILL)
        met.writer.close()
    server.close()
    await server.wait_closed()


@pytest.fixture
def stand_in(tmp_path: Path):
    """Write a stand-in's program and return the words that start it."""

    def write(body: str, name: str = "standin") -> tuple[str, ...]:
        path = tmp_path / f"{name}.py"
        path.write_text(PRELUDE + body)
        return (sys.executable, "-I", str(path))

    return write
