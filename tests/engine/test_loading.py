"""Engine hosts whose weights are still on their way: real processes, the fake engine; the test is the store process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from sllm.core.launch import Launch
from sllm.core.replica import ReplicaState, StartPhase
from sllm.rpc.engine import AttachRequest, EngineClient, HostStatus

pytestmark = pytest.mark.e2e

Make = Callable[..., Any]


async def until(client: EngineClient, launch: Launch, wanted: Callable[[HostStatus], bool]) -> HostStatus:
    async with asyncio.timeout(30), aclosing(client.attach(AttachRequest(nonce=launch.nonce))) as statuses:
        async for status in statuses:
            if wanted(status):
                return status
    raise AssertionError("the host never got there")


async def test_a_host_is_up_and_loads_while_its_weights_come(warm: Make, make_launch: Make) -> None:
    process, launch = warm(), make_launch(ready=0)
    record = await process.fork(launch)
    pool = process.pools[launch.nonce]
    client = EngineClient(record.address, None, peer="engine host")
    await until(client, launch, lambda status: status.phase is StartPhase.LOADING)
    pool.read_to(1)
    half = await until(client, launch, lambda status: status.progress > 0.1)
    assert (half.state, half.phase) == (ReplicaState.STARTING, StartPhase.LOADING)
    assert half.progress == pytest.approx(1 / 2, abs=0.1)  # the last of the three chunks is small
    pool.read_to(3)
    ready = await until(client, launch, lambda status: status.state is ReplicaState.READY)
    assert ready.phases_s.keys() == {"loading", "building"}
    await client.close()


async def test_a_host_whose_weights_are_in_memory_does_not_load(warm: Make, make_launch: Make) -> None:
    process, launch = warm(), make_launch()
    record = await process.fork(launch)
    client = EngineClient(record.address, None, peer="engine host")
    ready = await until(client, launch, lambda status: status.state is ReplicaState.READY)
    assert ready.phases_s.keys() == {"building"}
    await client.close()


async def test_weights_come_through_a_ring(warm: Make, make_launch: Make) -> None:
    process, launch = warm(), make_launch(slots=2)
    record = await process.fork(launch)
    pool = process.pools[launch.nonce]
    pool.read_to(2)
    pool.feed.settimeout(10)
    while pool.feed.recv(100) != b'{"taken": 1}':
        pass
    pool.put(2, 3)
    pool.say({"ready": 3})
    client = EngineClient(record.address, None, peer="engine host")
    await until(client, launch, lambda status: status.state is ReplicaState.READY)
    await client.close()


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ({"error": "CHUNK_CORRUPT", "message": "chunk 1 is not what was written"}, "CHUNK_CORRUPT"),
        (None, "UNAVAILABLE"),
    ],
    ids=["refused", "store-process-dies"],
)
async def test_a_load_that_fails_fails_the_start_with_its_reason(
    warm: Make, make_launch: Make, word: dict[str, str] | None, reason: str
) -> None:
    process, launch = warm(), make_launch(ready=0)
    record = await process.fork(launch)
    pool = process.pools[launch.nonce]
    client = EngineClient(record.address, None, peer="engine host")
    await until(client, launch, lambda status: status.phase is StartPhase.LOADING)
    if word:
        pool.say(word)
    pool.feed.close()
    failed = await until(client, launch, lambda status: status.state is ReplicaState.FAILED)
    assert failed.error_reason == reason
    await client.close()


async def test_a_manifest_that_is_gone_fails_the_start(warm: Make, make_launch: Make, tmp_path: Any) -> None:
    process, launch = warm(), make_launch(weights_dir=str(tmp_path))
    record = await process.fork(launch)
    client = EngineClient(record.address, None, peer="engine host")
    failed = await until(client, launch, lambda status: status.state is ReplicaState.FAILED)
    assert failed.error_reason == "MANIFEST_MISSING"
    await client.close()


async def test_a_host_that_is_killed_while_it_loads_gives_its_lease_back(warm: Make, make_launch: Make) -> None:
    process, launch = warm(), make_launch(ready=0)
    record = await process.fork(launch)
    pool = process.pools[launch.nonce]
    client = EngineClient(record.address, None, peer="engine host")
    await until(client, launch, lambda status: status.phase is StartPhase.LOADING)
    assert pool.is_leased
    await client.close()
    os.kill(record.pid, signal.SIGKILL)
    assert await process.exited(record.pid) == -signal.SIGKILL
    assert not pool.is_leased
    pool.feed.settimeout(10)
    assert pool.feed.recv(100) == b""  # nobody wants the load any more


async def test_a_host_that_dies_as_it_maps_its_weights_gives_its_lease_back(warm: Make, make_launch: Make) -> None:
    process, launch = warm(SLLM_FAILPOINT="host-mapped"), make_launch(ready=0)
    pid = process.ask(launch)["pid"]
    assert await process.exited(pid) == -signal.SIGKILL
    assert not process.pools[launch.nonce].is_leased
    assert not Path(launch.record_path).exists()


async def test_a_host_that_has_copied_its_weights_gives_its_lease_back(warm: Make, make_launch: Make) -> None:
    process, launch = warm(), make_launch()
    record = await process.fork(launch)
    pool = process.pools[launch.nonce]
    client = EngineClient(record.address, None, peer="engine host")
    await until(client, launch, lambda status: status.state is ReplicaState.READY)
    pool.feed.settimeout(10)
    assert pool.feed.recv(100) == b""
    assert not pool.is_leased
    await client.close()
