"""A controller with canned answers, served over real gRPC, and a command line that runs against it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from sllm.cli.main import main
from sllm.core.checkpoint import Checkpoint
from sllm.core.decision import (
    Candidate,
    Decision,
    DeploymentPlan,
    Explanation,
    PlannedStart,
    PlannedStop,
    WaitsOn,
)
from sllm.core.deployment import Deployment, DeploymentSpec, DeploymentState
from sllm.core.description import ClusterDescription, DescribedDeployment
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, NodeName, OperationId, ReplicaId, RequestId
from sllm.core.migration import MigrationPlan, PlannedMove
from sllm.core.node import LoadReport, Node, NodeReport, NodeState
from sllm.core.operation import Operation, OperationState
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus, StartPhase
from sllm.core.request import RequestRow, RequestState
from sllm.core.residency import Residency, ResidencyState, Tier, TierUsage
from sllm.core.snapshot import Policy
from sllm.core.startup import Basis, Estimate, Part
from sllm.rpc import control, transport

NOON = 1_735_732_800.0  # 2025-01-01T12:00:00Z
DEMO = CheckpointName("demo-model")
DIGEST = "sha256:5f3c"

CHECKPOINT = Checkpoint(
    name=DEMO,
    digest=DIGEST,
    size_bytes=14_000_000,
    architecture="LlamaForCausalLM",
    dtype="float32",
    tensor_count=39,
    max_model_len=512,
    source="/models/demo",
    created_at=NOON,
)
DEPLOYMENT = Deployment(
    spec=DeploymentSpec(name=DeploymentName("org/demo"), checkpoint=DEMO, max_replicas=2, engine_args={"seed": "7"}),
    revision=3,
    digest=DIGEST,
    created_at=NOON,
    updated_at=NOON + 60,
)
REPLICA = ReplicaStatus(
    spec=ReplicaSpec(
        id=ReplicaId("rep-0a1b2c3d4e5f"),
        deployment=DEPLOYMENT.spec.name,
        revision=3,
        generation=12,
        checkpoint=DEMO,
        digest=DIGEST,
        devices=(DeviceId("cpu-0"),),
        capacity=32,
        max_model_len=512,
    ),
    state=ReplicaState.STARTING,
    phase=StartPhase.LOADING,
    progress=0.42,
    phases_s={"queued": 0.01},
    started_at=NOON,
)


def _copy(tier: Tier, state: ResidencyState = ResidencyState.READY) -> Residency:
    return Residency(checkpoint=DEMO, digest=DIGEST, tier=tier, state=state, size_bytes=CHECKPOINT.size_bytes)


COPIES = (_copy(Tier.SSD), _copy(Tier.DRAM, ResidencyState.LOADING))
NODE = Node(
    report=NodeReport(
        name=NodeName("node-1"),
        incarnation="i1",
        revision=4,
        address="127.0.0.1:7710",
        version="0.1.0",
        engine="vllm",
        warm=True,
        devices=(
            Device(id=DeviceId("cpu-0"), kind=DeviceKind.CPU, state=DeviceState.LEASED, memory_bytes=4 << 30),
            Device(id=DeviceId("cpu-1"), kind=DeviceKind.CPU, state=DeviceState.FREE, memory_bytes=4 << 30),
        ),
        tiers=(
            TierUsage(tier=Tier.SSD, capacity_bytes=200 << 30, used_bytes=14_000_000),
            TierUsage(tier=Tier.DRAM, capacity_bytes=8 << 30, used_bytes=14_000_000),
        ),
        residencies=COPIES,
        checkpoints=(CHECKPOINT,),
        replicas=(REPLICA,),
        loads=(LoadReport(number=1, digest="sha256:5f3c", size_bytes=14, tier=Tier.SSD, queue_s=0.5, read_s=1.5),),
    ),
    state=NodeState.READY,
    last_seen=NOON,
)
STATUS = control.ClusterStatus(
    version="0.1.0",
    deployments=(
        control.DeploymentRow(
            deployment=DEPLOYMENT,
            state=DeploymentState.STARTING,
            reason="a request waits",
            wanted_replicas=1,
            held_requests=2,
        ),
    ),
    replicas=(control.ReplicaRow(node=NODE.report.name, status=REPLICA),),
    nodes=(NODE,),
)
CHECKPOINTS = control.CheckpointList(
    checkpoints=(
        control.CheckpointRow(
            checkpoint=CHECKPOINT,
            copies=tuple(control.CheckpointCopy(node=NODE.report.name, residency=copy) for copy in COPIES),
        ),
    )
)
REQUESTS = control.RequestList(
    requests=(
        RequestRow(
            id=RequestId("req-00ff"),
            deployment=DEPLOYMENT.spec.name,
            state=RequestState.RUNNING,
            replica=REPLICA.spec.id,
            node=NODE.report.name,
            prompt_tokens=11,
            output_tokens=5,
            started_at=NOON,
        ),
    )
)


PLAN = MigrationPlan(
    moves=(
        PlannedMove(
            request=RequestId("req-00ff"),
            source=REPLICA.spec.id,
            source_node=NODE.report.name,
            target=ReplicaId("rep-22"),
            target_node=NodeName("node-2"),
            move=True,
            pause_s=0.0125,
            left_s=9.25,
            why="it runs on",
        ),
        PlannedMove(
            request=RequestId("req-00aa"),
            source=REPLICA.spec.id,
            source_node=NODE.report.name,
            target=None,
            target_node=None,
            move=False,
            pause_s=0.0,
            left_s=None,
            why="it ends soon",
        ),
    ),
    starts=(NodeName("node-3"),),
    why="2 replicas would be stopped",
)


def _part(seconds: float, basis: Basis = Basis.MEASURED, observations: int = 5) -> Part:
    return Part(seconds=seconds, basis=basis, observations=observations)


def estimate(loading_s: float, *, building: Part | None = None) -> Estimate:
    return Estimate(
        queued=_part(0.0625),
        warming=_part(0.0, Basis.REPORTED, 0),
        forking=_part(0.25),
        loading=_part(loading_s),
        building=building or _part(0.5),
        tier=Tier.SSD,
        size_bytes=14_000_000,
    )


DECISION = Decision(
    replica=REPLICA.spec.id,
    deployment=DEPLOYMENT.spec.name,
    revision=3,
    node=NODE.report.name,
    devices=(DeviceId("cpu-0"),),
    priority=Priority.REQUEST,
    decided_at=NOON,
    why="1.8 s, of which 1.0 s loading from SSD",
    estimate=estimate(1.0),
    candidates=(
        Candidate(node=NODE.report.name, refused="", estimate=estimate(1.0)),
        Candidate(node=NodeName("node-2"), refused="2.8 s, of which 2.0 s loading from SSD", estimate=estimate(2.0)),
        Candidate(node=NodeName("node-3"), refused="0 of 1 devices are free", waits_on=WaitsOn.DEVICES),
    ),
    omitted=7,
    state=ReplicaState.READY,
    phases_s={"queued": 0.125, "forking": 0.375, "loading": 1.5, "building": 0.5},
    ready_at=NOON + 2.5,
)
EXPLANATION = Explanation(
    deployment=DEPLOYMENT.spec.name,
    waits_for="waiting for a free device",
    candidates=(
        Candidate(node=NodeName("node-2"), refused="", estimate=estimate(2.0, building=_part(2.0, Basis.GUESSED, 0))),
    ),
    decisions=(DECISION,),
)


DEPLOYMENT_PLAN = DeploymentPlan(
    deployment=DEPLOYMENT.spec.name,
    revision=4,
    starts=(
        PlannedStart(
            node=NODE.report.name, devices=(DeviceId("cpu-0"),), why="1.8 s, all of it", estimate=estimate(1.0)
        ),
    ),
    stops=(
        PlannedStop(
            replica=REPLICA.spec.id,
            deployment=DEPLOYMENT.spec.name,
            node=NODE.report.name,
            why="once revision 4 serves",
        ),
    ),
    waits_for="waiting for a free device",
    ready_s=1.8125,
    candidates=EXPLANATION.candidates,
)


DESCRIPTION = ClusterDescription(
    policy=Policy(),
    nodes=(NODE,),
    deployments=(DescribedDeployment(deployment=DEPLOYMENT, max_model_len=512, size_bytes=CHECKPOINT.size_bytes),),
)


@dataclass
class FakeControl:
    """`asked` records what arrived. Operations run through `changes`, then end; `endless` ones never do."""

    asked: list[Any] = field(default_factory=list)
    changes: tuple[dict[str, Any], ...] = ({"phase": "copying", "progress": 0.5}, {"state": OperationState.DONE})
    endless: bool = False
    error: Exception | None = None
    status: control.ClusterStatus = STATUS
    checkpoints: control.CheckpointList = CHECKPOINTS
    requests: control.RequestList = REQUESTS
    plan: MigrationPlan = PLAN
    explanation: Explanation = EXPLANATION
    deployment_plan: DeploymentPlan = DEPLOYMENT_PLAN
    description: ClusterDescription = DESCRIPTION
    log: tuple[str, ...] = ("first line\n", "second line\n")
    watched: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def _begin(self, kind: str, target: str, request: object) -> Operation:
        self._check(request)
        self.operation = Operation(
            id=OperationId("op-77aa"), kind=kind, target=target, state=OperationState.RUNNING, created_at=NOON
        )
        return self.operation

    def _check(self, request: object) -> None:
        self.asked.append(request)
        if self.error is not None:
            raise self.error

    async def add_checkpoint(self, request: control.AddCheckpointRequest) -> Operation:
        return self._begin("checkpoint.add", request.name, request)

    async def remove_checkpoint(self, request: control.RemoveCheckpointRequest) -> Operation:
        return self._begin("checkpoint.remove", request.name, request)

    async def verify_checkpoint(self, request: control.VerifyCheckpointRequest) -> Operation:
        return self._begin("checkpoint.verify", request.name, request)

    async def deploy(self, request: control.DeployRequest) -> Operation:
        return self._begin("deploy", request.spec.name, request)

    async def plan_deploy(self, request: control.DeployRequest) -> DeploymentPlan:
        self._check(request)
        return self.deployment_plan

    async def plan_scale(self, request: control.ScaleRequest) -> DeploymentPlan:
        self._check(request)
        return self.deployment_plan

    async def delete(self, request: control.DeleteRequest) -> Operation:
        return self._begin("delete", request.name, request)

    async def scale(self, request: control.ScaleRequest) -> Operation:
        return self._begin("scale", request.name, request)

    async def migrate(self, request: control.MigrateRequest) -> Operation:
        return self._begin("migrate", request.request or request.replica or "", request)

    async def drain(self, request: control.DrainRequest) -> Operation:
        return self._begin("drain", request.node, request)

    async def plan_migration(self, request: control.MigrateRequest) -> MigrationPlan:
        self._check(request)
        return self.plan

    async def plan_drain(self, request: control.DrainRequest) -> MigrationPlan:
        self._check(request)
        return self.plan

    async def cordon(self, request: control.CordonRequest) -> control.Empty:
        self._check(request)
        return control.Empty()

    async def watch_operation(self, request: control.WatchOperationRequest) -> AsyncIterator[Operation]:
        self.asked.append(request)
        operation = self.operation
        for change in self.changes:
            operation = replace(operation, **change)
            yield operation
        self.watched.set()
        if self.endless:
            await asyncio.Event().wait()

    async def list_checkpoints(self, request: control.Empty) -> control.CheckpointList:
        self._check(request)
        return self.checkpoints

    async def get_status(self, request: control.Empty) -> control.ClusterStatus:
        self._check(request)
        return self.status

    async def list_requests(self, request: control.Empty) -> control.RequestList:
        self._check(request)
        return self.requests

    async def explain(self, request: control.ExplainRequest) -> Explanation:
        self._check(request)
        return self.explanation

    async def describe_cluster(self, request: control.Empty) -> ClusterDescription:
        self._check(request)
        return self.description

    async def read_logs(self, request: control.ReadLogsRequest) -> AsyncIterator[control.LogChunk]:
        self._check(request)
        for text in self.log:
            yield control.LogChunk(text=text)


@dataclass
class Server:
    """Serves in a thread of its own, as another process would."""

    control: FakeControl

    def run(self, ready: threading.Event, stop: threading.Event) -> None:
        asyncio.run(self._serve(ready, stop))

    async def _serve(self, ready: threading.Event, stop: threading.Event) -> None:
        server, port = await transport.serve([control.handlers(self.control)], "127.0.0.1:0", None)
        self.control.address = f"127.0.0.1:{port}"
        ready.set()
        await asyncio.to_thread(stop.wait)
        await server.stop(0)


@pytest.fixture
def controller() -> Iterator[FakeControl]:
    fake = FakeControl()
    server = Server(fake)
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=server.run, args=(ready, stop))
    thread.start()
    assert ready.wait(10)
    yield fake
    stop.set()
    thread.join(10)


@pytest.fixture(autouse=True)
def home(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty $SLLM_HOME; nothing of the real one is seen."""
    path = tmp_path / "home"
    monkeypatch.setenv("SLLM_HOME", str(path))
    for name in ("SLLM_CONTEXT", "SLLM_CONTROLLER", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return path


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def sllm(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a command line in this process."""

    def call(*args: str) -> Answer:
        code = main(args)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def ask(controller: FakeControl, sllm: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Run a command line against the canned controller."""
    monkeypatch.setenv("SLLM_CONTROLLER", controller.address)
    return sllm
