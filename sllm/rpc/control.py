"""ControlService: what operators call. Messages, the Protocol the controller implements, and its client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from sllm.core.checkpoint import Checkpoint
from sllm.core.decision import DeploymentPlan, Explanation
from sllm.core.deployment import Deployment, DeploymentSpec, DeploymentState
from sllm.core.description import ClusterDescription
from sllm.core.device import DeviceKind
from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, NodeName, OperationId, ReplicaId, RequestId
from sllm.core.migration import MigrationPlan, RecomputeCost
from sllm.core.node import Node
from sllm.core.operation import Operation
from sllm.core.replica import ReplicaStatus
from sllm.core.request import RequestRow
from sllm.core.residency import Residency
from sllm.core.startup import EstimatorError
from sllm.rpc import common_pb2, controller_pb2
from sllm.rpc.transport import Client, Handlers, Method


@dataclass(frozen=True, slots=True, kw_only=True)
class Empty:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class LogChunk:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddCheckpointRequest:
    """No `nodes` and not `all_nodes`: one node with room that can see the source."""

    request_id: str
    name: CheckpointName
    source: str
    nodes: tuple[NodeName, ...] = ()
    all_nodes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCopy:
    node: NodeName
    residency: Residency


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeRow:
    """What recomputing tokens takes on one kind of device, learnt from migrations (paper §5.2).

    `error_p50` and `error_p95` are |predicted - measured| / measured of the last rounds; None: not known yet.
    """

    kind: DeviceKind
    cost: RecomputeCost
    error_p50: float | None = None
    error_p95: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    checkpoint: Checkpoint
    copies: tuple[CheckpointCopy, ...] = ()
    recomputes: tuple[RecomputeRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointList:
    checkpoints: tuple[CheckpointRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveCheckpointRequest:
    """No `nodes`: from all."""

    request_id: str
    name: CheckpointName
    nodes: tuple[NodeName, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyCheckpointRequest:
    """No `nodes`: every copy. `deep`: the sha256 of all bytes, not only the hash of each chunk."""

    request_id: str
    name: CheckpointName
    nodes: tuple[NodeName, ...] = ()
    deep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployRequest:
    request_id: str
    spec: DeploymentSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteRequest:
    request_id: str
    name: DeploymentName


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequest:
    """`replicas` is "have so many now"; min and max bound what autoscaling does from then on."""

    request_id: str
    name: DeploymentName
    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateRequest:
    """One `request`, or all of one `replica`, to `node`; a replica is started there if none has room."""

    request_id: str
    node: NodeName
    request: RequestId | None = None
    replica: ReplicaId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRequest:
    """The node takes nothing new; what runs there is moved, or may finish, within `deadline_s`."""

    request_id: str
    node: NodeName
    deadline_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CordonRequest:
    """Nothing new is placed where it is cordoned; what runs stays. No `device`: the whole node.

    Uncordoning a node that drains, or was drained, ends that too.
    """

    request_id: str
    node: NodeName
    cordoned: bool
    device: DeviceId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOperationRequest:
    id: OperationId


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentRow:
    """`reason` says in words why the state is what it is, where that is not obvious (waiting, failed)."""

    deployment: Deployment
    state: DeploymentState
    reason: str = ""
    ready_replicas: int = 0
    wanted_replicas: int = 0
    running_requests: int = 0
    held_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRow:
    node: NodeName
    status: ReplicaStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    version: str
    deployments: tuple[DeploymentRow, ...] = ()
    replicas: tuple[ReplicaRow, ...] = ()
    nodes: tuple[Node, ...] = ()
    estimator: EstimatorError = field(default_factory=EstimatorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainRequest:
    """`target` is a deployment's name, or the id of a replica or a request."""

    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestList:
    requests: tuple[RequestRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLogsRequest:
    """`target` is a replica's id or a node's name; `lines` counts from the end."""

    target: str
    lines: int


class ControlService(Protocol):
    """Mutations return the Operation at once; `watch_operation` yields it as it changes, until it is over."""

    async def add_checkpoint(self, request: AddCheckpointRequest) -> Operation: ...
    async def list_checkpoints(self, request: Empty) -> CheckpointList: ...
    async def remove_checkpoint(self, request: RemoveCheckpointRequest) -> Operation: ...
    async def verify_checkpoint(self, request: VerifyCheckpointRequest) -> Operation: ...
    async def deploy(self, request: DeployRequest) -> Operation: ...
    async def plan_deploy(self, request: DeployRequest) -> DeploymentPlan:
        """What `deploy` would do; nothing is changed."""
        ...

    async def delete(self, request: DeleteRequest) -> Operation: ...
    async def scale(self, request: ScaleRequest) -> Operation: ...
    async def plan_scale(self, request: ScaleRequest) -> DeploymentPlan:
        """What `scale` would do; nothing is changed."""
        ...

    async def migrate(self, request: MigrateRequest) -> Operation: ...
    async def plan_migration(self, request: MigrateRequest) -> MigrationPlan:
        """What `migrate` would do; nothing is changed."""
        ...

    async def drain(self, request: DrainRequest) -> Operation: ...
    async def plan_drain(self, request: DrainRequest) -> MigrationPlan:
        """What `drain` would do; nothing is changed."""
        ...

    async def cordon(self, request: CordonRequest) -> Empty: ...
    def watch_operation(self, request: WatchOperationRequest) -> AsyncIterator[Operation]: ...
    async def get_status(self, request: Empty) -> ClusterStatus: ...
    async def list_requests(self, request: Empty) -> RequestList: ...
    async def explain(self, request: ExplainRequest) -> Explanation: ...
    async def describe_cluster(self, request: Empty) -> ClusterDescription:
        """All that a simulation begins from."""
        ...

    def read_logs(self, request: ReadLogsRequest) -> AsyncIterator[LogChunk]: ...


NAME = "sllm.rpc.ControlService"
_c, _m = common_pb2, controller_pb2
ADD_CHECKPOINT = Method("AddCheckpoint", AddCheckpointRequest, _m.AddCheckpointRequest, Operation, _c.Operation)
LIST_CHECKPOINTS = Method("ListCheckpoints", Empty, _c.Empty, CheckpointList, _m.CheckpointList)
REMOVE_CHECKPOINT = Method(
    "RemoveCheckpoint", RemoveCheckpointRequest, _m.RemoveCheckpointRequest, Operation, _c.Operation
)
VERIFY_CHECKPOINT = Method(
    "VerifyCheckpoint", VerifyCheckpointRequest, _m.VerifyCheckpointRequest, Operation, _c.Operation
)
DEPLOY = Method("Deploy", DeployRequest, _m.DeployRequest, Operation, _c.Operation)
PLAN_DEPLOY = Method("PlanDeploy", DeployRequest, _m.DeployRequest, DeploymentPlan, _c.DeploymentPlan)
DELETE = Method("Delete", DeleteRequest, _m.DeleteRequest, Operation, _c.Operation)
SCALE = Method("Scale", ScaleRequest, _m.ScaleRequest, Operation, _c.Operation)
PLAN_SCALE = Method("PlanScale", ScaleRequest, _m.ScaleRequest, DeploymentPlan, _c.DeploymentPlan)
MIGRATE = Method("Migrate", MigrateRequest, _m.MigrateRequest, Operation, _c.Operation)
PLAN_MIGRATION = Method("PlanMigration", MigrateRequest, _m.MigrateRequest, MigrationPlan, _m.MigrationPlan)
DRAIN = Method("Drain", DrainRequest, _m.DrainRequest, Operation, _c.Operation)
PLAN_DRAIN = Method("PlanDrain", DrainRequest, _m.DrainRequest, MigrationPlan, _m.MigrationPlan)
CORDON = Method("Cordon", CordonRequest, _m.CordonRequest, Empty, _c.Empty)
WATCH_OPERATION = Method(
    "WatchOperation", WatchOperationRequest, _m.WatchOperationRequest, Operation, _c.Operation, "stream"
)
GET_STATUS = Method("GetStatus", Empty, _c.Empty, ClusterStatus, _m.ClusterStatus)
LIST_REQUESTS = Method("ListRequests", Empty, _c.Empty, RequestList, _m.RequestList)
EXPLAIN = Method("Explain", ExplainRequest, _m.ExplainRequest, Explanation, _c.Explanation)
DESCRIBE_CLUSTER = Method("DescribeCluster", Empty, _c.Empty, ClusterDescription, _c.ClusterDescription)
READ_LOGS = Method("ReadLogs", ReadLogsRequest, _m.ReadLogsRequest, LogChunk, _c.LogChunk, "stream")
METHODS = (
    ADD_CHECKPOINT,
    LIST_CHECKPOINTS,
    REMOVE_CHECKPOINT,
    VERIFY_CHECKPOINT,
    DEPLOY,
    PLAN_DEPLOY,
    DELETE,
    SCALE,
    PLAN_SCALE,
    MIGRATE,
    PLAN_MIGRATION,
    DRAIN,
    PLAN_DRAIN,
    CORDON,
    WATCH_OPERATION,
    GET_STATUS,
    LIST_REQUESTS,
    EXPLAIN,
    DESCRIBE_CLUSTER,
    READ_LOGS,
)


def handlers(implementation: ControlService) -> Handlers:
    """Return the service for `transport.serve`."""
    return Handlers(NAME, METHODS, implementation)


class ControlClient(Client):
    """Client of ControlService; also implements the Protocol, so that tests may pass one for the other."""

    service = NAME

    async def add_checkpoint(self, request: AddCheckpointRequest) -> Operation:
        return await self._unary(ADD_CHECKPOINT, request)

    async def list_checkpoints(self, request: Empty) -> CheckpointList:
        return await self._unary(LIST_CHECKPOINTS, request)

    async def remove_checkpoint(self, request: RemoveCheckpointRequest) -> Operation:
        return await self._unary(REMOVE_CHECKPOINT, request)

    async def verify_checkpoint(self, request: VerifyCheckpointRequest) -> Operation:
        return await self._unary(VERIFY_CHECKPOINT, request)

    async def deploy(self, request: DeployRequest) -> Operation:
        return await self._unary(DEPLOY, request)

    async def plan_deploy(self, request: DeployRequest) -> DeploymentPlan:
        return await self._unary(PLAN_DEPLOY, request)

    async def delete(self, request: DeleteRequest) -> Operation:
        return await self._unary(DELETE, request)

    async def scale(self, request: ScaleRequest) -> Operation:
        return await self._unary(SCALE, request)

    async def plan_scale(self, request: ScaleRequest) -> DeploymentPlan:
        return await self._unary(PLAN_SCALE, request)

    async def migrate(self, request: MigrateRequest) -> Operation:
        return await self._unary(MIGRATE, request)

    async def plan_migration(self, request: MigrateRequest) -> MigrationPlan:
        return await self._unary(PLAN_MIGRATION, request)

    async def drain(self, request: DrainRequest) -> Operation:
        return await self._unary(DRAIN, request)

    async def plan_drain(self, request: DrainRequest) -> MigrationPlan:
        return await self._unary(PLAN_DRAIN, request)

    async def cordon(self, request: CordonRequest) -> Empty:
        return await self._unary(CORDON, request)

    async def watch_operation(self, request: WatchOperationRequest) -> AsyncIterator[Operation]:
        async with aclosing(self._stream(WATCH_OPERATION, request)) as stream:
            async for operation in stream:
                yield operation

    async def get_status(self, request: Empty) -> ClusterStatus:
        return await self._unary(GET_STATUS, request)

    async def list_requests(self, request: Empty) -> RequestList:
        return await self._unary(LIST_REQUESTS, request)

    async def explain(self, request: ExplainRequest) -> Explanation:
        return await self._unary(EXPLAIN, request)

    async def describe_cluster(self, request: Empty) -> ClusterDescription:
        return await self._unary(DESCRIBE_CLUSTER, request)

    async def read_logs(self, request: ReadLogsRequest) -> AsyncIterator[LogChunk]:
        async with aclosing(self._stream(READ_LOGS, request)) as stream:
            async for chunk in stream:
                yield chunk
