"""Shared by the agent's tests: a checkpoint folder, a node in this process, and an agent as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sllm import config as configs
from sllm.agent.changes import Changes
from sllm.agent.devices.fake import FakeDevices
from sllm.agent.folders import prepare
from sllm.agent.node import LocalNode
from sllm.agent.processes import open_process
from sllm.agent.store.fake import FakeStore
from sllm.agent.warm.fake import FakeWarm
from sllm.config import AgentConfig
from sllm.core.checkpoint import Checkpoint
from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, OperationId, ReplicaId
from sllm.core.launch import LaunchRecord
from sllm.core.node import NodeReport
from sllm.core.replica import ReplicaSpec, ReplicaStatus
from sllm.errors import SllmError
from sllm.linux import start_ticks
from sllm.loader.storage.direct import DirectFile
from sllm.rpc import nodes, transport
from sllm.rpc.agents import AddCheckpointCommand, AgentClient, StartReplicaCommand, StopReplicaCommand
from sllm.rpc.nodes import HeartbeatRequest, HeartbeatResponse, RegisterResponse

TENSOR_BYTES = 4 << 20


def write_model(folder: Path, tensor_bytes: int = TENSOR_BYTES) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128, "vocab_size": 100})
    )
    header = json.dumps({"w": {"dtype": "U8", "shape": [tensor_bytes], "data_offsets": [0, tensor_bytes]}}).encode()
    shard = len(header).to_bytes(8, "little") + header + bytes(tensor_bytes)
    (folder / "model.safetensors").write_bytes(shard)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face folder with one tensor."""
    return write_model(tmp_path / "model")


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, tensor_bytes=TENSOR_BYTES: write_model(tmp_path / name, tensor_bytes)


def spec_of(digest: str, **changes: Any) -> ReplicaSpec:
    spec = ReplicaSpec(
        id=ReplicaId("rep-000000000001"),
        deployment=DeploymentName("story"),
        revision=1,
        generation=1,
        checkpoint=CheckpointName("demo"),
        digest=digest,
        devices=(DeviceId("fake-0"),),
        capacity=4,
        max_model_len=128,
    )
    return replace(spec, **changes)


@pytest.fixture
def make_spec() -> Callable[..., ReplicaSpec]:
    """Return a function that makes a ReplicaSpec for a digest; keywords replace fields."""
    return spec_of


async def eventually(node: LocalNode, true: Callable[[], Any], within_s: float = 10.0) -> None:
    """Wait, by the node's own changes, until something holds."""
    async with asyncio.timeout(within_s):
        seen = -1
        while not true():
            seen = await node.changes.wait_beyond(max(seen, node.changes.revision))


class Reading:
    """The disk of a node's store process: it can be held, so that a load does not get on."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._free.set()
        self.opened: list[str] = []

    def hold(self) -> None:
        self._free.clear()

    def go_on(self) -> None:
        self._free.set()

    def open(self, path: Path, size_bytes: int) -> DirectFile:
        self.opened.append(path.parent.name)
        return _HeldFile(path, size_bytes, self._free)


class _HeldFile(DirectFile):
    def __init__(self, path: Path, size_bytes: int, free: threading.Event) -> None:
        super().__init__(path, size_bytes)
        self._free = free

    def read_into(self, view: memoryview, offset: int, *, fresh: bool = False) -> int:
        self._free.wait()
        return super().read_into(view, offset, fresh=fresh)


@dataclass
class NodeInTest:
    """A node in this process, with fake devices and a fake warm process."""

    local: LocalNode
    warm: FakeWarm
    devices: FakeDevices
    reading: Reading
    store_process: FakeStore

    async def add(self, model: Path, name: str = "demo") -> str:
        """Add a checkpoint and return its digest."""
        async for progress in self.local.checkpoints.add(CheckpointName(name), str(model)):
            last = progress
        assert last.checkpoint is not None
        return last.checkpoint.digest

    def status(self, replica: str = "rep-000000000001") -> ReplicaStatus | None:
        return next((s for s in self.local.replicas.statuses() if s.spec.id == replica), None)

    def log_path(self, replica: str) -> Path:
        return self.local.config.state_dir / "log" / f"{replica}.log"

    def state(self, replica: str = "rep-000000000001") -> str:
        status = self.status(replica)
        return str(status.state) if status else "gone"

    async def until(self, true: Callable[[], Any], within_s: float = 10.0) -> None:
        await eventually(self.local, true, within_s)

    async def until_host(self, count: int = 1) -> Any:
        """Return the newest of `count` engine hosts once it has been attached to."""
        await self.until(lambda: len(self.warm.hosts) >= count and any(s.pid for s in self.local.replicas.statuses()))
        return self.warm.hosts[-1]


@pytest.fixture
async def make_node(tmp_path: Path) -> AsyncIterator[Callable[..., NodeInTest]]:
    """Return a function that makes a node; keywords are fields of `[engine]`, and those named here."""
    made: list[NodeInTest] = []

    def make(
        *,
        devices: int = 1,
        memory_bytes: int = 1 << 30,
        dram_bytes: int = 256 << 20,
        ssd_bytes: int = 0,
        **engine: Any,
    ) -> NodeInTest:
        values = {
            "name": "node-1",
            "controller": "127.0.0.1:1",
            "state_dir": str(tmp_path / "state"),
            "engine": {"kind": "fake", **engine},
            "store": {"ssd_bytes": ssd_bytes},
        }
        config = configs.check(values, AgentConfig, origin="test")
        warm, source, changes, reading = FakeWarm(), FakeDevices(devices, memory_bytes), Changes(), Reading()
        store_process = FakeStore(dram_bytes, open_source=reading.open)
        local = LocalNode(
            config,
            None,
            prepare(config.state_dir),
            store_process=store_process,
            devices=source,
            warm=warm,
            changes=changes,
        )
        made.append(NodeInTest(local, warm, source, reading, store_process))
        return made[-1]

    yield make
    for node in made:
        node.reading.go_on()
        await node.local.close(stop_hosts=True)


@dataclass
class ControllerInTest:
    """A controller that only listens. `refusals` are raised by the next registrations, one each."""

    reports: list[NodeReport] = field(default_factory=list)
    heartbeats: list[HeartbeatRequest] = field(default_factory=list)
    refusals: list[SllmError] = field(default_factory=list)
    registrations: int = 0
    resync: bool = False
    epoch: int = 1
    heartbeat_s: float = 0.5
    changes: Changes = field(default_factory=Changes)
    address: str = ""

    async def register(self, request: NodeReport) -> RegisterResponse:
        if self.refusals:
            raise self.refusals.pop(0)
        self.registrations += 1
        self._take(request)
        return RegisterResponse(epoch=self.epoch, heartbeat_s=self.heartbeat_s)

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        self.heartbeats.append(request)
        if request.report is not None:
            self._take(request.report)
        resync, self.resync = self.resync, False
        self.changes.notify()
        return HeartbeatResponse(epoch=self.epoch, resync=resync)

    def _take(self, report: NodeReport) -> None:
        self.reports.append(report)
        self.changes.notify()

    async def until(self, true: Callable[[NodeReport], Any], within_s: float = 30.0) -> NodeReport:
        """Return the first report, from the last one on, for which something holds."""
        async with asyncio.timeout(within_s):
            while True:
                seen = self.changes.revision
                if self.reports and true(self.reports[-1]):
                    return self.reports[-1]
                await self.changes.wait_beyond(seen)


@pytest.fixture
async def controller() -> AsyncIterator[ControllerInTest]:
    listening = ControllerInTest()
    server, port = await transport.serve([nodes.handlers(listening)], "127.0.0.1:0", None)
    listening.address = f"127.0.0.1:{port}"
    yield listening
    await server.stop(None)


_RUN = """
import asyncio, sys
from pathlib import Path
from sllm import config, log
from sllm.agent.main import run
from sllm.errors import SllmError
loaded = config.load(Path(sys.argv[1]), config.AgentConfig)
try:
    asyncio.run(run(loaded, log.setup(level="info", json_lines=False)))
except SllmError as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(4)
"""


@dataclass
class AgentInTest:
    """An agent as a process, which reports to the test."""

    folder: Path
    controller: ControllerInTest
    options: dict[str, dict[str, Any]]
    environment: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    client: AgentClient | None = None

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def log_path(self) -> Path:
        return self.folder / "agent.log"

    def config(self) -> Path:
        lines = ['name = "node-1"', 'listen = "127.0.0.1:0"', f'controller = "{self.controller.address}"']
        lines.append(f'state_dir = "{self.state}"')
        for section, values in self.options.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        path = self.folder / "agent.toml"
        path.write_text("\n".join(lines))
        return path

    async def start(self, within_s: float = 30.0) -> NodeReport:
        """Start it and return its first report once its warm process is ready."""
        before = len(self.controller.reports)
        await self.spawn()
        report = await self.controller.until(lambda r: len(self.controller.reports) > before and r.warm, within_s)
        if self.client is not None:
            await self.client.close()
        self.client = AgentClient(report.address, None, peer="agent")
        return report

    async def spawn(self) -> asyncio.subprocess.Process:
        output = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _RUN, str(self.config())),
            stderr=output,
            env={**os.environ, **self.environment},
        )
        os.close(output)
        return self.process

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        async with asyncio.timeout(20):
            return await self.process.wait()

    async def add(self, model: Path, name: str = "demo") -> Checkpoint:
        assert self.client is not None
        command = AddCheckpointCommand(
            epoch=1, operation=OperationId("op-1"), name=CheckpointName(name), source=str(model)
        )
        async for progress in self.client.add_checkpoint(command):
            last = progress
        assert last.checkpoint is not None
        return last.checkpoint

    async def start_replica(self, spec: ReplicaSpec) -> None:
        assert self.client is not None
        await self.client.start_replica(StartReplicaCommand(epoch=1, spec=spec))

    async def stop_replica(self, spec: ReplicaSpec, drain_s: float = 0.0) -> None:
        assert self.client is not None
        command = StopReplicaCommand(epoch=1, replica=spec.id, generation=spec.generation, drain_s=drain_s)
        await self.client.stop_replica(command)

    async def replica_in(self, state: str, within_s: float = 30.0) -> ReplicaStatus:
        """Wait until the one replica is reported in a state."""
        report = await self.controller.until(
            lambda r: [status.state for status in r.replicas] == [state], within_s=within_s
        )
        return report.replicas[0]

    def host_records(self) -> list[LaunchRecord]:
        return [LaunchRecord.from_json(path.read_text()) for path in (self.state / "run").glob("*.json")]

    async def close(self) -> None:
        if self.process is not None and self.process.returncode is None:
            await self.kill()
        if self.client is not None:
            await self.client.close()
        for record in self.host_records() if (self.state / "run").exists() else ():
            if start_ticks(record.pid) == record.start_ticks:
                os.kill(record.pid, signal.SIGKILL)


@pytest.fixture
async def make_agent(tmp_path: Path, controller: ControllerInTest) -> AsyncIterator[Callable[..., AgentInTest]]:
    """Return a function that makes an agent with the fake engine; keywords are fields of `[engine]`."""
    async with AsyncExitStack() as stack:

        def make(*, env: dict[str, str] | None = None, devices: int = 1, **engine: Any) -> AgentInTest:
            options = {
                "engine": {"kind": "fake", **engine},
                "devices": {"kind": "cpu", "cpu_slots": devices, "cpu_threads": 1, "memory_bytes": 1 << 30},
                "store": {"dram_bytes": 1 << 28},
            }
            agent = AgentInTest(tmp_path, controller, options, env or {})
            stack.push_async_callback(agent.close)
            return agent

        yield make


@pytest.fixture
def process_end() -> Callable[[int], Awaitable[None]]:
    """Return a function that waits until a process, whoever's child it is, has ended."""

    async def wait(pid: int) -> None:
        pidfd = open_process(pid)
        if pidfd is None:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout(20):
                await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)

    return wait
