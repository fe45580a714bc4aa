"""The agent as a process, with real engine hosts and the fake engine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.core.device import DeviceState
from sllm.core.ids import DeviceId, ReplicaId
from sllm.core.residency import ResidencyState, Tier
from sllm.errors import Conflict, NotFound, StaleGeneration
from sllm.linux import start_ticks
from sllm.rpc.agents import AgentReadLogsRequest, GetExecutionFilesRequest, PrefetchCommand

pytestmark = pytest.mark.e2e

CPU = (DeviceId("cpu-0"),)


def device_states(report: Any) -> list[DeviceState]:
    return [device.state for device in report.devices]


async def test_a_replica_starts_serves_and_stops(
    make_agent: Callable[..., Any],
    make_spec: Callable[..., Any],
    model: Path,
    process_end: Callable[[int], Awaitable[None]],
) -> None:
    agent = make_agent()
    report = await agent.start()
    assert report.engine.startswith("fake ")
    assert device_states(report) == [DeviceState.FREE]
    checkpoint = await agent.add(model)
    spec = make_spec(checkpoint.digest, devices=CPU)
    await agent.start_replica(spec)
    status = await agent.replica_in("ready")
    assert status.phases_s.keys() == {"queued", "forking", "loading", "building"}
    assert status.address
    assert start_ticks(status.pid) is not None
    scratch = agent.state / "scratch" / "replicas" / spec.id
    assert scratch.stat().st_mode & 0o777 == 0o700
    report = agent.controller.reports[-1]
    assert device_states(report) == [DeviceState.LEASED]
    assert {(r.tier, r.state) for r in report.residencies} == {
        (tier, ResidencyState.READY) for tier in (Tier.SSD, Tier.DRAM, Tier.DEVICE)
    }
    with pytest.raises(Conflict, match="leased to replica"):
        await agent.start_replica(make_spec(checkpoint.digest, id=ReplicaId("rep-2"), devices=CPU))
    await agent.stop_replica(spec)
    await process_end(status.pid)
    report = await agent.controller.until(lambda r: not r.replicas)
    assert device_states(report) == [DeviceState.FREE]
    assert agent.host_records() == []
    assert not scratch.exists()


async def test_a_second_start_finds_the_weights_in_memory(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent()
    await agent.start()
    digest = (await agent.add(model)).digest
    spec = make_spec(digest, devices=CPU)
    await agent.start_replica(spec)
    await agent.replica_in("ready")
    await agent.stop_replica(spec)
    report = await agent.controller.until(lambda r: not r.replicas)
    assert Tier.DRAM in {r.tier for r in report.residencies}
    again = make_spec(digest, id=ReplicaId("rep-2"), generation=2, devices=CPU)
    await agent.start_replica(again)
    await agent.replica_in("ready")
    assert len(agent.controller.reports[-1].loads) == 1


async def test_what_is_read_ahead_is_in_memory_for_the_first_start(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent()
    await agent.start()
    spec = make_spec((await agent.add(model)).digest, id=ReplicaId(""), devices=CPU)
    await agent.client.prefetch(PrefetchCommand(epoch=1, spec=spec))
    in_memory = (Tier.DRAM, ResidencyState.READY)
    report = await agent.controller.until(lambda r: in_memory in {(each.tier, each.state) for each in r.residencies})
    assert (device_states(report), report.replicas) == ([DeviceState.FREE], ())
    await agent.start_replica(make_spec(spec.digest, devices=CPU))
    await agent.replica_in("ready")
    assert len(agent.controller.reports[-1].loads) == 1
    with pytest.raises(StaleGeneration):
        await agent.client.prefetch(PrefetchCommand(epoch=0, spec=spec))


async def test_a_killed_host_is_a_failed_replica_with_free_devices(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent()
    await agent.start()
    spec = make_spec((await agent.add(model)).digest, devices=CPU)
    await agent.start_replica(spec)
    os.kill((await agent.replica_in("ready")).pid, signal.SIGKILL)
    status = await agent.replica_in("failed")
    assert status.error.startswith("engine died: signal 9")
    assert status.error_reason == "ENGINE_FAILED"
    await agent.controller.until(lambda r: device_states(r) == [DeviceState.FREE])
    await agent.stop_replica(spec)
    await agent.controller.until(lambda r: not r.replicas)


async def test_a_stopped_host_is_a_failed_replica_with_free_devices(
    make_agent: Callable[..., Any],
    make_spec: Callable[..., Any],
    model: Path,
    process_end: Callable[[int], Awaitable[None]],
) -> None:
    agent = make_agent()
    await agent.start()
    spec = make_spec((await agent.add(model)).digest, devices=CPU)
    await agent.start_replica(spec)
    os.kill((await agent.replica_in("ready")).pid, signal.SIGSTOP)
    status = await agent.replica_in("failed")
    assert (status.error, status.error_reason) == ("the engine host does not answer", "ENGINE_FAILED")
    await process_end(status.pid)
    await agent.controller.until(lambda r: device_states(r) == [DeviceState.FREE])
    again = make_spec(spec.digest, id=ReplicaId("rep-2"), generation=2, devices=CPU)
    await agent.stop_replica(spec)
    await agent.start_replica(again)
    await agent.replica_in("ready")


async def test_a_host_that_cannot_build_its_engine_fails_with_the_reason(
    make_agent: Callable[..., Any],
    make_spec: Callable[..., Any],
    model: Path,
    process_end: Callable[[int], Awaitable[None]],
) -> None:
    agent = make_agent(env={"SLLM_FAKE_BUILD_ERROR": "no kernel image"})
    await agent.start()
    await agent.start_replica(make_spec((await agent.add(model)).digest, devices=CPU))
    status = await agent.replica_in("failed")
    assert "no kernel image" in status.error
    await process_end(status.pid)
    await agent.controller.until(lambda r: device_states(r) == [DeviceState.FREE])


async def test_a_restarted_agent_finds_its_engine_hosts_again(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent(grace_s=20.0)
    await agent.start()
    spec = make_spec((await agent.add(model)).digest, devices=CPU)
    await agent.start_replica(spec)
    before = await agent.replica_in("ready")
    await agent.kill()
    report = await agent.start()
    assert [status.state for status in report.replicas] == ["ready"]
    assert (report.replicas[0].pid, report.replicas[0].address) == (before.pid, before.address)
    assert device_states(report) == [DeviceState.LEASED]
    assert report.checkpoints[0].digest == spec.digest
    await agent.start_replica(spec)  # the same command again starts nothing
    assert [record.pid for record in agent.host_records()] == [before.pid]
    await agent.stop_replica(spec)
    await agent.controller.until(lambda r: not r.replicas)
    assert start_ticks(before.pid) is None


async def test_a_found_host_that_does_not_answer_is_ended(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent(grace_s=60.0)
    await agent.start()
    await agent.start_replica(make_spec((await agent.add(model)).digest, devices=CPU))
    status = await agent.replica_in("ready")
    os.kill(status.pid, signal.SIGSTOP)
    await agent.kill()
    await agent.start()
    report = await agent.controller.until(lambda r: not r.replicas)
    assert device_states(report) == [DeviceState.FREE]
    assert start_ticks(status.pid) is None


async def test_hosts_of_an_agent_that_does_not_come_back_end_after_the_grace(
    make_agent: Callable[..., Any],
    make_spec: Callable[..., Any],
    model: Path,
    process_end: Callable[[int], Awaitable[None]],
) -> None:
    agent = make_agent(grace_s=1.0)
    await agent.start()
    spec = make_spec((await agent.add(model)).digest, devices=CPU)
    await agent.start_replica(spec)
    status = await agent.replica_in("ready")
    await agent.kill()
    await process_end(status.pid)
    report = await agent.start()  # and their records do not confuse the next agent
    assert report.replicas == ()
    assert agent.host_records() == []


async def test_an_orderly_stop_leaves_hosts_running_for_the_next_agent(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent(grace_s=20.0)
    await agent.start()
    await agent.start_replica(make_spec((await agent.add(model)).digest, devices=CPU))
    before = await agent.replica_in("ready")
    assert await agent.kill(signal.SIGTERM) == 0
    assert start_ticks(before.pid) is not None
    report = await agent.start()
    assert [(status.state, status.pid) for status in report.replicas] == [("ready", before.pid)]


async def test_stop_with_agent_leaves_no_process(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent(stop_with_agent=True)
    await agent.start()
    await agent.start_replica(make_spec((await agent.add(model)).digest, devices=CPU))
    status = await agent.replica_in("ready")
    left = children(agent.process.pid)
    assert await agent.kill(signal.SIGTERM) == 0
    assert [pid for pid in (status.pid, *left) if start_ticks(pid)] == []
    assert agent.host_records() == []


async def test_a_start_is_called_off_while_the_engine_is_built(
    make_agent: Callable[..., Any],
    make_spec: Callable[..., Any],
    model: Path,
    process_end: Callable[[int], Awaitable[None]],
) -> None:
    agent = make_agent(env={"SLLM_FAKE_LOAD_S": "60"})
    await agent.start()
    spec = make_spec((await agent.add(model)).digest, devices=CPU)
    await agent.start_replica(spec)
    report = await agent.controller.until(lambda r: r.replicas and r.replicas[0].phase == "building")
    await agent.stop_replica(spec)
    await process_end(report.replicas[0].pid)
    report = await agent.controller.until(lambda r: not r.replicas)
    assert device_states(report) == [DeviceState.FREE]


async def test_a_killed_warm_process_is_replaced_and_its_hosts_live_on(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent(devices=2)
    await agent.start()
    digest = (await agent.add(model)).digest
    await agent.start_replica(make_spec(digest, devices=CPU))
    status = await agent.replica_in("ready")
    warm = child_that_runs(agent, "sllm.engine.warm")
    os.kill(warm, signal.SIGKILL)
    await agent.controller.until(lambda r: not r.warm)
    other = make_spec(digest, id=ReplicaId("rep-2"), devices=(DeviceId("cpu-1"),))
    await agent.start_replica(other)
    report = await agent.controller.until(lambda r: [s.state for s in r.replicas] == ["ready", "ready"])
    assert report.replicas[0].pid == status.pid


def child_that_runs(agent: Any, module: str) -> int:
    return next(
        pid for pid in children(agent.process.pid) if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_nothing_of_a_killed_agent_stays_beyond_the_grace(
    make_agent: Callable[..., Any], process_end: Callable[[int], Awaitable[None]]
) -> None:
    agent = make_agent(grace_s=1.0)
    await agent.start()
    left = children(agent.process.pid)
    assert len(left) == 2  # the warm process, which ends at once, and the store process
    await agent.kill()
    for pid in left:
        await process_end(pid)


async def test_what_is_in_memory_outlives_agent_and_store_process(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent(grace_s=20.0)
    await agent.start()
    spec = make_spec((await agent.add(model)).digest, devices=CPU)
    await agent.start_replica(spec)
    await agent.replica_in("ready")
    await agent.controller.until(lambda r: in_dram(r) == [ResidencyState.READY] and len(r.loads) == 1)
    os.kill(child_that_runs(agent, "sllm.agent.store.main"), signal.SIGKILL)
    await agent.controller.until(lambda r: in_dram(r) == [ResidencyState.LOADING])
    await agent.controller.until(lambda r: in_dram(r) == [ResidencyState.READY])
    store = child_that_runs(agent, "sllm.agent.store.main")
    await agent.kill()
    await agent.start()
    await agent.controller.until(lambda r: in_dram(r) == [ResidencyState.READY])
    assert start_ticks(store) is not None
    await agent.stop_replica(spec)
    again = make_spec(spec.digest, id=ReplicaId("rep-2"), generation=2, devices=CPU)
    await agent.controller.until(lambda r: not r.replicas)
    await agent.start_replica(again)
    await agent.replica_in("ready")
    assert agent.controller.reports[-1].loads == ()


def in_dram(report: Any) -> list[ResidencyState]:
    return [residency.state for residency in report.residencies if residency.tier is Tier.DRAM]


async def test_a_store_process_that_dies_while_it_reads_fails_the_start_and_is_replaced(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    agent = make_agent(env={"SLLM_FAILPOINT": "mid-read"})
    await agent.start()
    spec = make_spec((await agent.add(make_model("large", 64 << 20))).digest, devices=CPU)
    await agent.start_replica(spec)
    status = await agent.replica_in("failed")
    assert "store process ended" in status.error
    await agent.controller.until(lambda r: device_states(r) == [DeviceState.FREE])


async def test_serves_execution_files_and_logs(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    agent = make_agent()
    await agent.start()
    large = os.urandom(9 << 20)
    (model / "tokenizer.json").write_bytes(large)
    (model / "empty.txt").touch()
    digest = (await agent.add(model)).digest
    files = {f.path: f.content async for f in agent.client.get_execution_files(GetExecutionFilesRequest(digest=digest))}
    assert files == {
        "config.json": (model / "config.json").read_bytes(),
        "tokenizer.json": large,
        "empty.txt": b"",
    }
    with pytest.raises(NotFound):
        [f async for f in agent.client.get_execution_files(GetExecutionFilesRequest(digest="sha256:0"))]
    spec = make_spec(digest, devices=CPU)
    await agent.start_replica(spec)
    await agent.replica_in("ready")
    assert "engine host of" in await read_log(agent, spec.id, 10)
    assert "registered with the controller" in await read_log(agent, "", 100)
    assert await read_log(agent, spec.id, 0) == ""
    for unknown in ("rep-unknown", "../agent", "rep-../x"):
        with pytest.raises(NotFound):
            await read_log(agent, unknown, 10)


async def read_log(agent: Any, replica: str, lines: int) -> str:
    request = AgentReadLogsRequest(replica=replica, lines=lines)
    return "".join([chunk.text async for chunk in agent.client.read_logs(request)])


async def test_a_second_agent_with_the_name_gives_up_with_the_reason(make_agent: Callable[..., Any]) -> None:
    agent = make_agent()
    agent.controller.refusals = [Conflict("node 'node-1' is alive at 127.0.0.1:7710")] * 1000
    process = await agent.spawn()
    assert await process.wait() == 4
    assert "is alive at 127.0.0.1:7710" in agent.log_path.read_text()


async def test_a_state_folder_is_for_one_agent(make_agent: Callable[..., Any]) -> None:
    agent = make_agent()
    await agent.start()
    first = agent.process
    try:
        process = await agent.spawn()
        assert await process.wait() == 4
        assert f"in use by another agent, process {first.pid}" in agent.log_path.read_text()
    finally:
        first.terminate()
        await first.wait()


def test_the_agent_imports_neither_torch_nor_vllm() -> None:
    import subprocess

    code = "import sllm.agent.main, sys; print([m for m in ('torch', 'vllm', 'starlette') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
