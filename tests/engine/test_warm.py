"""The warm process and the hosts it forks, as real processes with the fake engine. The tests play the agent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.core.launch import Launch
from sllm.core.replica import ReplicaState
from sllm.core.tokens import OpenStream
from sllm.engine.process import CPU_NICE
from sllm.errors import StaleGeneration
from sllm.linux import start_ticks
from sllm.rpc.engine import EngineClient, StopRequest

pytestmark = pytest.mark.e2e

Make = Callable[..., Any]


def stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


async def test_it_says_what_it_is_when_it_is_ready(warm: Make) -> None:
    process = warm()
    assert process.ready["engine"] == "fake"
    assert process.ready["architectures"] == []
    assert process.ready["seconds"] >= 0


async def test_a_host_has_its_own_session_and_the_agent_as_parent(warm: Make, make_launch: Make) -> None:
    process, launch = warm(), make_launch()
    record = await process.fork(launch)
    _, parent, group, session, *_ = stat(record.pid)
    assert (int(parent), int(group), int(session)) == (os.getpid(), record.pid, record.pid)
    assert (record.nonce, record.spec, record.start_ticks) == (launch.nonce, launch.spec, start_ticks(record.pid))
    assert Path(launch.record_path).stat().st_mode & 0o777 == 0o600
    assert os.getpriority(os.PRIO_PROCESS, record.pid) >= CPU_NICE
    assert Path(f"/proc/{record.pid}/comm").read_text().strip() == launch.spec.id[:15]


async def test_a_record_says_where_its_host_saves_for_an_agent_that_comes_later(warm: Make, make_launch: Make) -> None:
    record = await warm().fork(make_launch(save_runtime="/somewhere"))
    assert record.save_runtime == "/somewhere"


async def test_a_host_serves_and_stops_when_told_to(
    warm: Make, make_launch: Make, request_of: Make, collect: Make, settled: Make
) -> None:
    process, launch = warm(), make_launch()
    record = await process.fork(launch)
    client = EngineClient(record.address, None, peer="engine host")
    assert (await settled(client, launch.nonce)).state is ReplicaState.READY
    stream = client.open_stream(OpenStream(protocol_version=1, gateway="g", generation=launch.spec.generation))
    stream.send(request_of(1, [5, 6], max_tokens=4))
    assert len((await collect(stream, 1))[1]) == 4
    await stream.close()
    await client.stop(StopRequest())
    assert await process.exited(record.pid) == 0
    await client.close()


async def test_hosts_outlive_the_warm_process(warm: Make, make_launch: Make, settled: Make) -> None:
    process, launch = warm(), make_launch()
    record = await process.fork(launch)
    process.process.send_signal(signal.SIGKILL)
    process.process.wait()
    client = EngineClient(record.address, None, peer="engine host")
    assert (await settled(client, launch.nonce)).state is ReplicaState.READY
    await client.close()
    os.kill(record.pid, signal.SIGTERM)
    assert await process.exited(record.pid) == 0


def test_an_engine_that_cannot_be_imported_is_told_in_one_line(warm: Make, subreaper: None) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    hidden = "import sys; sys.modules['vllm.version'] = None; from sllm.engine.warm import main; main()"
    command = [sys.executable, "-c", hidden, "--fd", str(theirs.fileno()), "--engine", "vllm"]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        answer = json.loads(ours.recv(1 << 16))
        assert process.wait(60) == 1
    assert answer["nonce"] == ""
    assert "not installed" in answer["error"]


async def test_it_ends_when_the_agent_closes_its_end(warm: Make) -> None:
    process = warm()
    process.control.shutdown(socket.SHUT_RDWR)
    assert process.process.wait(10) == 0


async def test_an_interrupt_at_the_terminal_does_not_end_it(warm: Make, make_launch: Make, settled: Make) -> None:
    process, launch = warm(), make_launch()
    process.process.send_signal(signal.SIGINT)
    record = await process.fork(launch)
    os.kill(record.pid, signal.SIGINT)
    client = EngineClient(record.address, None, peer="engine host")
    assert (await settled(client, launch.nonce)).state is ReplicaState.READY
    await client.close()


async def test_a_host_without_an_agent_ends_after_the_grace(warm: Make, make_launch: Make) -> None:
    process = warm()
    record = await process.fork(make_launch(grace_s=0.2))
    assert await process.exited(record.pid) == 0


async def test_only_who_knows_the_nonce_may_attach(warm: Make, make_launch: Make, settled: Make) -> None:
    process = warm()
    record = await process.fork(make_launch())
    client = EngineClient(record.address, None, peer="engine host")
    with pytest.raises(StaleGeneration):
        await settled(client, "guess")
    await client.close()


async def test_it_forks_several_and_goes_on_after_a_request_it_cannot_understand(warm: Make, make_launch: Make) -> None:
    process = warm()
    process.control.send(json.dumps({"fork": "n"}).encode())  # without descriptors
    answer = json.loads(process.control.recv(1 << 16))
    assert answer["nonce"] == "n"
    assert "descriptors" in answer["error"]
    records = [await process.fork(make_launch(id=f"rep-{i:014}")) for i in range(3)]
    assert len({record.address for record in records}) == 3


async def test_a_build_that_fails_is_told_to_the_agent(warm: Make, make_launch: Make, settled: Make) -> None:
    process, launch = warm(SLLM_FAKE_BUILD_ERROR="no luck"), make_launch()
    record = await process.fork(launch)
    client = EngineClient(record.address, None, peer="engine host")
    status = await settled(client, launch.nonce)
    assert (status.state, status.error, status.error_reason) == (ReplicaState.FAILED, "no luck", "ENGINE_FAILED")
    await client.close()


async def test_data_may_grow_by_the_lease_and_no_further(warm: Make, make_launch: Make) -> None:
    process = warm()
    lease = 1 << 30
    record = await process.fork(make_launch(memory_bytes=lease))
    limits = Path(f"/proc/{record.pid}/limits").read_text()
    line = next(line for line in limits.splitlines() if line.startswith("Max data size"))
    assert lease < int(line.split()[3]) < 2 * lease  # the rest: what the warm process had, and stacks


async def test_its_log_goes_where_the_agent_says(warm: Make, make_launch: Make) -> None:
    process, launch = warm(), make_launch()
    record = await process.fork(launch)
    os.kill(record.pid, signal.SIGTERM)
    assert await process.exited(record.pid) == 0
    assert f"engine host of {launch.spec.id} ends" in process.log.read_text()


async def test_nothing_but_the_socket_and_its_own_files_is_inherited(warm: Make, make_launch: Make) -> None:
    process = warm()
    before = len(os.listdir(f"/proc/{process.process.pid}/fd"))
    record = await process.fork(make_launch())
    process.control.send(b"{}")  # once this is answered, what came before is over
    process.control.recv(1 << 16)
    assert len(os.listdir(f"/proc/{process.process.pid}/fd")) == before
    targets = [os.readlink(f"/proc/{record.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{record.pid}/fd")]
    assert [target for target in targets if target.startswith("/memfd:")] == []


def test_the_fake_needs_neither_torch_nor_vllm(warm: Callable[..., Any], make_launch: Callable[..., Launch]) -> None:
    process = warm()
    mapped = Path(f"/proc/{process.process.pid}/maps").read_text()
    assert "/torch/" not in mapped
    assert len(os.listdir(f"/proc/{process.process.pid}/task")) == 1
