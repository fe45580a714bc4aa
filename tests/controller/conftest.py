"""A whole controller in this process, over real gRPC, with agents that run nothing and a clock that tests move."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sllm.config import ControllerConfig
from sllm.controller.clock import Clock
from sllm.controller.events import Woken
from sllm.controller.main import Running, running
from sllm.controller.store.base import StateStore
from sllm.controller.store.memory import MemoryStore
from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import DeploymentSpec
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.migration import MigrationOrder, MigrationReport, MigrationState, Round
from sllm.core.node import LoadReport, NodeReport
from sllm.core.operation import Operation
from sllm.core.replica import ReplicaState, ReplicaStatus, StartPhase
from sllm.core.request import RequestRow, RequestState
from sllm.core.residency import Residency, ResidencyState, Tier, TierUsage
from sllm.errors import Conflict, NotFound, SllmError, StaleGeneration, Unavailable
from sllm.rpc import agents
from sllm.rpc.agents import (
    AddCheckpointCommand,
    AddProgress,
    AgentReadLogsRequest,
    GetExecutionFilesRequest,
    MigrateCommand,
    PrefetchCommand,
    RemoveCheckpointCommand,
    StartReplicaCommand,
    StopReplicaCommand,
    VerifyCheckpointCommand,
)
from sllm.rpc.control import (
    ControlClient,
    CordonRequest,
    DeleteRequest,
    DeployRequest,
    DrainRequest,
    Empty,
    LogChunk,
    MigrateRequest,
    ScaleRequest,
    WatchOperationRequest,
)
from sllm.rpc.nodes import HeartbeatRequest, NodeClient
from sllm.rpc.routes import AcquireRequest, AcquireUpdate, ReportLoadRequest, RouteClient, WatchRoutesRequest
from sllm.rpc.transport import serve

GIB = 1 << 30


def checkpoint_of(name: str, **fields: Any) -> Checkpoint:
    values: dict[str, Any] = {"digest": f"digest-{name}", "size_bytes": 1000, "architecture": "Llama"}
    values |= {"dtype": "float32", "tensor_count": 3, "max_model_len": 64}
    return Checkpoint(name=name, **{**values, **fields})


async def stalled(order: MigrationOrder) -> AsyncIterator[MigrationReport]:
    """A source that gets nowhere."""
    await asyncio.Event().wait()
    yield MigrationReport(migration=order.id, request="", state=MigrationState.QUEUED)


class FakeAgent:
    """Answers commands and reports, as a test tells it to.

    `held`: starts go no further than a test says (`finish`); `refusal`: what the next start is answered with;
    `breaks`: (error, reason) that starts end with; `damage`: what a verification finds; `silent`: no heartbeat is
    sent; `sources`: what can be added; `migrates`: told of each order, it says what becomes of each request;
    `phases_s`: what the phases of starts that end well take; `loads`, `in_memory`, `warm`: what it reports.
    """

    def __init__(self, name: str, *, devices: int = 1, checkpoints: tuple[str, ...] = ("m",), port: int = 0) -> None:
        self.name, self.port, self.address = name, port, ""
        self.incarnation = f"{name}-{id(self)}"
        self.devices = [f"{name}-d{i}" for i in range(devices)]
        self.memory_bytes = GIB
        self.checkpoints = {c: checkpoint_of(c) for c in checkpoints}
        self.replicas: dict[str, ReplicaStatus] = {}
        self.sources: dict[str, Any] = {}
        self.held = self.silent = self.drains = self.unreachable = False
        self.refusal: SllmError | None = None
        self.breaks: tuple[str, str] | None = None
        self.commands: list[Any] = []
        self.epoch = self.revision = 0
        self.tell = True
        self.free_bytes = 100 * GIB
        self.add_goes_on = asyncio.Event()
        self.add_goes_on.set()
        self.verify_goes_on = asyncio.Event()
        self.verify_goes_on.set()
        self.damage: SllmError | None = None
        self.phases_s: dict[str, float] = {}
        self.loads: tuple[LoadReport, ...] = ()
        self.in_memory: set[str] = set()
        self.warm = True
        self.migrates: Callable[[MigrationOrder], AsyncIterator[MigrationReport]] = stalled
        self._server: Any = None
        self._client: NodeClient | None = None
        self._reports: set[asyncio.Task[Any]] = set()

    async def start(self) -> FakeAgent:
        self._server, self.port = await serve([agents.handlers(self)], f"127.0.0.1:{self.port}", None)
        self.address = f"127.0.0.1:{self.port}"
        return self

    async def join(self, controller: str) -> None:
        if self._client:
            await self._client.close()
        self._client = NodeClient(controller, None, peer="controller")
        await self._client.register(self.report())

    async def stop(self) -> None:
        """As if the process was killed: nothing is said to anybody."""
        self.silent = True
        for task in self._reports:
            task.cancel()
        await asyncio.gather(*self._reports, return_exceptions=True)
        if self._client:
            await self._client.close()
        if self._server:
            await self._server.stop(None)

    # -- what it says

    def report(self) -> NodeReport:
        leased = {d for status in self.replicas.values() for d in status.spec.devices}
        return NodeReport(
            name=self.name,
            incarnation=self.incarnation,
            revision=self.revision,
            address=self.address,
            version="0",
            engine="fake",
            warm=self.warm,
            devices=tuple(
                Device(
                    id=d,
                    kind=DeviceKind.CPU,
                    state=DeviceState.LEASED if d in leased else DeviceState.FREE,
                    memory_bytes=self.memory_bytes,
                )
                for d in self.devices
            ),
            tiers=(
                TierUsage(tier=Tier.SSD, capacity_bytes=self.free_bytes, used_bytes=0),
                TierUsage(tier=Tier.DRAM, capacity_bytes=GIB, used_bytes=1000 * len(self.in_memory)),
            ),
            residencies=tuple(
                Residency(
                    checkpoint=c.name, digest=c.digest, tier=tier, state=ResidencyState.READY, size_bytes=c.size_bytes
                )
                for c in self.checkpoints.values()
                for tier in ((Tier.SSD, Tier.DRAM) if c.name in self.in_memory else (Tier.SSD,))
            ),
            checkpoints=tuple(self.checkpoints.values()),
            replicas=tuple(self.replicas.values()),
            loads=self.loads,
        )

    async def beat(self, *, full: bool = False) -> bool:
        """Send a heartbeat and return whether the whole report was asked for (and, if so, send that)."""
        assert self._client
        request = HeartbeatRequest(
            name=self.name,
            incarnation=self.incarnation,
            revision=self.revision,
            report=self.report() if full else None,
        )
        resync = (await self._client.heartbeat(request)).resync
        if resync:
            await self.beat(full=True)
        return resync

    def changed(self) -> None:
        """Report at once, as an agent does, unless the test holds the report back (`tell`)."""
        self.revision += 1
        if self.tell and not self.silent:
            task = asyncio.create_task(self._tell())
            self._reports.add(task)
            task.add_done_callback(self._reports.discard)

    async def says(self, **facts: Any) -> None:
        """Report these from now on; return when the controller knows."""
        for name, value in facts.items():
            setattr(self, name, value)
        self.revision += 1
        await self.beat(full=True)

    async def _tell(self) -> None:
        with suppress(Unavailable):  # a controller that is away is told when the agent joins again
            await self.beat(full=True)

    def progress(self, replica: str, **fields: Any) -> None:
        self.replicas[replica] = replace(self.replicas[replica], **fields)
        self.changed()

    def finish(self, replica: str | None = None) -> None:
        """A start (the only one) has come to its end: ready, or broken."""
        replica = replica or next(i for i, s in self.replicas.items() if s.state is ReplicaState.STARTING)
        if self.breaks:
            error, reason = self.breaks
            self.progress(replica, state=ReplicaState.FAILED, error=error, error_reason=reason)
        else:
            phases_s = self.phases_s or self.replicas[replica].phases_s
            ready = {"state": ReplicaState.READY, "phase": StartPhase.READY, "phases_s": phases_s}
            self.progress(replica, **ready, address=f"{self.name}:9")

    def gone(self, replica: str) -> None:
        self.replicas.pop(replica, None)
        self.changed()

    # -- what it is asked

    def _heard(self, command: Any) -> None:
        if command.epoch < self.epoch:
            raise StaleGeneration("an older controller")
        self.epoch = command.epoch
        self.commands.append(command)

    def starts(self) -> list[StartReplicaCommand]:
        return [c for c in self.commands if isinstance(c, StartReplicaCommand)]

    def stops(self) -> list[StopReplicaCommand]:
        return [c for c in self.commands if isinstance(c, StopReplicaCommand)]

    async def start_replica(self, request: StartReplicaCommand) -> Empty:
        self._heard(request)
        if self.refusal:
            refusal, self.refusal = self.refusal, None
            raise refusal
        if request.spec.id in self.replicas:
            return Empty()  # it raises the priority
        if any(set(s.spec.devices) & set(request.spec.devices) for s in self.replicas.values()):
            raise Conflict(f"devices {request.spec.devices} are leased")
        self.replicas[request.spec.id] = ReplicaStatus(spec=request.spec, state=ReplicaState.STARTING)
        self.changed()
        if not self.held:
            self.finish(request.spec.id)
        return Empty()

    async def stop_replica(self, request: StopReplicaCommand) -> Empty:
        """A drain waits for the test (`gone`) if it is told to."""
        self._heard(request)
        if request.drain_s and self.drains and request.replica in self.replicas:
            self.progress(request.replica, state=ReplicaState.DRAINING)
        else:
            self.gone(request.replica)
        return Empty()

    async def add_checkpoint(self, request: AddCheckpointCommand) -> AsyncIterator[AddProgress]:
        self._heard(request)
        source = self.sources.get(request.source, NotFound(f"{request.source} is not on {self.name}"))
        if isinstance(source, SllmError):
            raise source
        yield AddProgress(done_bytes=250, total_bytes=1000)
        await self.add_goes_on.wait()
        made = checkpoint_of(request.name, digest=source, source=request.source)
        self.checkpoints[request.name] = made
        yield AddProgress(done_bytes=1000, total_bytes=1000, checkpoint=made)
        self.changed()

    async def remove_checkpoint(self, request: RemoveCheckpointCommand) -> Empty:
        self._heard(request)
        if request.name not in self.checkpoints:
            raise NotFound(f"{request.name} is not on {self.name}")
        del self.checkpoints[request.name]
        self.changed()
        return Empty()

    async def verify_checkpoint(self, request: VerifyCheckpointCommand) -> AsyncIterator[AddProgress]:
        self._heard(request)
        yield AddProgress(done_bytes=500, total_bytes=1000)
        await self.verify_goes_on.wait()
        if self.damage:
            raise self.damage
        yield AddProgress(done_bytes=1000, total_bytes=1000, checkpoint=self.checkpoints[request.name])

    async def prefetch(self, request: PrefetchCommand) -> Empty:
        self._heard(request)
        self.in_memory.add(request.spec.checkpoint)
        self.changed()
        return Empty()

    def orders(self) -> list[MigrationOrder]:
        return [c.order for c in self.commands if isinstance(c, MigrateCommand)]

    async def migrate(self, request: MigrateCommand) -> AsyncIterator[MigrationReport]:
        self._heard(request)
        async for report in self.migrates(request.order):
            yield report

    async def get_execution_files(self, request: GetExecutionFilesRequest) -> AsyncIterator[Any]:
        raise NotFound("none")
        yield

    async def read_logs(self, request: AgentReadLogsRequest) -> AsyncIterator[LogChunk]:
        yield LogChunk(text=f"{self.name}:{request.replica}:{request.lines}")


class FakeGateway:
    """Acquires, and reports what it has open."""

    def __init__(self, client: RouteClient, name: str = "gateway") -> None:
        self.client, self.name = client, name
        self.rows: dict[str, RequestRow] = {}
        self._numbers = itertools.count(1)

    async def acquire(
        self, deployment: str = "app", *, timeout_s: float = 1000.0, seen: list[AcquireUpdate] | None = None
    ) -> RequestRow:
        """Hold a request until it has a replica; what is told meanwhile goes to `seen`."""
        request = f"req-{next(self._numbers)}"
        asked = AcquireRequest(
            gateway=self.name, request_id=request, deployment=deployment, timeout_s=timeout_s, prompt_tokens=3
        )
        async for update in self.client.acquire(asked):
            if seen is not None:
                seen.append(update)
            if update.target:
                row = RequestRow(
                    id=request, deployment=deployment, state=RequestState.RUNNING, replica=update.target.replica
                )
                self.rows[request] = row
                return row
        raise AssertionError("the stream ended without a target")

    async def report(self, **finished: int) -> None:
        await self.client.report_load(
            ReportLoadRequest(gateway=self.name, requests=tuple(self.rows.values()), finished=finished)
        )

    async def finish(self, row: RequestRow) -> None:
        """End a request that was reported as running."""
        await self.report()
        del self.rows[row.id]
        await self.report()


class Bench:
    """The controller under test, and all who talk to it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.clock = Clock(wall=lambda: self.now + 1e9, monotonic=lambda: self.now)
        self.agents: dict[str, FakeAgent] = {}
        self.gateway: FakeGateway | None = None
        self.gateway_silent = False
        self.controller: Running
        self.control: ControlClient
        self.routes: RouteClient
        self._requests = itertools.count(1)
        self._stack = AsyncExitStack()

    async def open(self, store: StateStore, **config: Any) -> Bench:
        values = {"listen": "127.0.0.1:0", "state_dir": "unused", "node_lease_s": 15.0, "drain_s": 30.0}
        values |= {"displace": True, **config}
        self.controller = await self._stack.enter_async_context(
            running(ControllerConfig(**values), store, self.clock, None)
        )
        address = self.controller.address
        self.control = ControlClient(address, None, peer="controller")
        self.routes = RouteClient(address, None, peer="controller")
        self._stack.push_async_callback(self.control.close)
        self._stack.push_async_callback(self.routes.close)
        self.gateway = FakeGateway(self.routes)
        return self

    async def restart(self, store: StateStore, **config: Any) -> None:
        """Stop the controller and start another on the same store; agents and their replicas stay."""
        await self._stack.aclose()
        await self.open(store, **config)

    async def close(self) -> None:
        for agent in self.agents.values():
            await agent.stop()
        await self._stack.aclose()

    async def add(self, name: str, **fields: Any) -> FakeAgent:
        agent = self.agents[name] = await FakeAgent(name, **fields).start()
        await agent.join(self.controller.address)
        return agent

    async def settle(self) -> None:
        """Return when the writer has planned after everything that it was told so far."""
        await self.controller.inbox.submit(Woken())
        await self.controller.inbox.submit(Woken())

    async def until(self, condition: Callable[[], Any]) -> None:
        """Let the controller and its peers talk until it holds; they all run in this loop."""
        async with asyncio.timeout(20):
            while not condition():
                await self.control.get_status(Empty())
                await self.settle()

    async def quiet(self) -> None:
        """Let everything that is under way come to its end."""
        for _ in range(5):
            await self.control.get_status(Empty())
            await self.settle()

    async def advance(self, seconds: float) -> None:
        """Let time pass, with the heartbeats and load reports that are sent meanwhile."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            for agent in self.agents.values():
                if not agent.silent:
                    await agent.beat()
            if self.gateway and not self.gateway_silent:
                await self.gateway.report()
            await self.quiet()

    # -- operators

    async def deploy(self, name: str = "app", *, request_id: str = "", **spec: Any) -> Operation:
        wish = DeploymentSpec(**{"name": name, "checkpoint": "m", **spec})
        return await self.control.deploy(DeployRequest(request_id=request_id or self._next(), spec=wish))

    async def delete(self, name: str = "app") -> Operation:
        return await self.control.delete(DeleteRequest(request_id=self._next(), name=name))

    async def scale(self, name: str = "app", **fields: Any) -> Operation:
        return await self.control.scale(ScaleRequest(request_id=self._next(), name=name, **fields))

    async def migrate(self, node: str, **fields: Any) -> Operation:
        return await self.control.migrate(MigrateRequest(request_id=self._next(), node=node, **fields))

    async def drain(self, node: str, deadline_s: float = 120.0, *, request_id: str = "") -> Operation:
        return await self.control.drain(
            DrainRequest(request_id=request_id or self._next(), node=node, deadline_s=deadline_s)
        )

    async def cordon(self, node: str, *, cordoned: bool = True, device: str | None = None) -> None:
        await self.control.cordon(CordonRequest(request_id=self._next(), node=node, cordoned=cordoned, device=device))

    async def node(self, name: str) -> Any:
        status = await self.control.get_status(Empty())
        return next(node for node in status.nodes if node.report.name == name)

    async def request(self, replica: Any, name: str, **fields: Any) -> RequestRow:
        """A request that runs, as a gateway reports it."""
        assert self.gateway
        values: dict[str, Any] = {"prompt_tokens": 3, "output_tokens": 5, "interval_s": 0.01, "max_tokens": 1000}
        spec = replica.spec
        row = RequestRow(
            id=name, deployment=spec.deployment, state=RequestState.RUNNING, replica=spec.id, **{**values, **fields}
        )
        self.gateway.rows[name] = row
        await self.gateway.report()
        return row

    async def moves_all(self, order: MigrationOrder) -> AsyncIterator[MigrationReport]:
        """A source whose requests go to the target, where their gateway follows them."""
        for request in order.requests:
            measured = Round(tokens=100, cached_tokens=0, seconds=0.5)
            values: dict[str, Any] = {"migration": order.id, "request": request, "rounds": 1, "sent_bytes": 400}
            yield MigrationReport(**values, state=MigrationState.ROUNDS, last_round=measured)
            self.follow(request, order.target.replica)
            yield MigrationReport(**values, state=MigrationState.MOVED)

    def follow(self, request: str, replica: str) -> None:
        assert self.gateway
        row = self.gateway.rows[request]
        self.gateway.rows[request] = replace(row, replica=replica, moves=row.moves + 1)

    async def done(self, operation: Operation) -> Operation:
        """Wait for an operation to be over."""
        async with asyncio.timeout(20):
            return [o async for o in self.control.watch_operation(WatchOperationRequest(id=operation.id))][-1]

    def operation(self, operation: Operation) -> Operation:
        """An operation as it stands."""
        job = self.controller.world.jobs.get(operation.id)
        assert job
        return job.operation

    async def row(self, name: str = "app") -> Any:
        status = await self.control.get_status(Empty())
        return next((row for row in status.deployments if row.deployment.spec.name == name), None)

    async def table(self) -> Any:
        """The route table of this moment, by deployment."""
        async for table in self.routes.watch_routes(WatchRoutesRequest(gateway="test")):
            return {route.deployment.spec.name: route for route in table.routes}
        raise AssertionError

    def replicas(self, name: str = "app") -> list[Any]:
        return self.controller.world.cluster.of(name)

    def ready(self, name: str = "app") -> int:
        return sum(replica.ready for replica in self.replicas(name))

    def _next(self) -> str:
        return f"test-{next(self._requests)}"


@asynccontextmanager
async def opened(store: StateStore, **config: Any) -> AsyncIterator[Bench]:
    bench = await Bench().open(store, **config)
    try:
        yield bench
    finally:
        await bench.close()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def bench(store: MemoryStore) -> AsyncIterator[Bench]:
    """A controller with default settings and no nodes yet."""
    async with opened(store) as made:
        yield made


@pytest.fixture
def tools() -> SimpleNamespace:
    return SimpleNamespace(opened=opened, FakeAgent=FakeAgent, FakeGateway=FakeGateway, checkpoint_of=checkpoint_of)
