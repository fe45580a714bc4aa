from __future__ import annotations

import asyncio
import os
import signal
import socket

import pytest

from sllm.config import ControllerConfig
from sllm.controller.main import run
from sllm.controller.store.sqlite import SqliteStore
from sllm.errors import Conflict
from sllm.log import LogTail
from sllm.rpc.control import ControlClient, Empty


def config(folder, **fields):
    return ControllerConfig(**{"listen": "127.0.0.1:0", "state_dir": folder, **fields})


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    """The socket that a process says on that it is ready."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


async def ready(supervisor):
    """Wait for readiness and return the address."""
    message = await asyncio.get_running_loop().sock_recv(supervisor, 1000)
    return dict(line.split("=", 1) for line in message.decode().splitlines())["X_ADDRESS"]


async def test_says_when_it_is_ready_serves_and_stops_on_sigterm(tmp_path, supervisor):
    running = asyncio.create_task(run(config(tmp_path / "state"), LogTail()))
    client = ControlClient(await ready(supervisor), None, peer="controller")
    assert (await client.get_status(Empty())).nodes == ()
    await client.close()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 5)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


async def test_state_in_use_is_refused(tmp_path):
    store = await SqliteStore.open(tmp_path / "state" / "store")
    with pytest.raises(Conflict, match="in use"):
        await run(config(tmp_path / "state"), LogTail())
    await store.close()


async def test_a_taken_port_is_named_and_the_state_is_given_back(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for _ in range(2):
            with pytest.raises(Conflict, match=address):
                await run(config(tmp_path / "state", listen=address), LogTail())
