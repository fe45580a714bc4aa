from sllm.rpc import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AddCheckpointRequest(_message.Message):
    __slots__ = ("request_id", "name", "source", "nodes", "all_nodes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    ALL_NODES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    source: str
    nodes: _containers.RepeatedScalarFieldContainer[str]
    all_nodes: bool
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., source: _Optional[str] = ..., nodes: _Optional[_Iterable[str]] = ..., all_nodes: bool = ...) -> None: ...

class CheckpointCopy(_message.Message):
    __slots__ = ("node", "residency")
    NODE_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    node: str
    residency: _common_pb2.Residency
    def __init__(self, node: _Optional[str] = ..., residency: _Optional[_Union[_common_pb2.Residency, _Mapping]] = ...) -> None: ...

class RecomputeRow(_message.Message):
    __slots__ = ("kind", "cost", "error_p50", "error_p95")
    KIND_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    ERROR_P50_FIELD_NUMBER: _ClassVar[int]
    ERROR_P95_FIELD_NUMBER: _ClassVar[int]
    kind: _common_pb2.DeviceKind
    cost: _common_pb2.RecomputeCost
    error_p50: float
    error_p95: float
    def __init__(self, kind: _Optional[_Union[_common_pb2.DeviceKind, str]] = ..., cost: _Optional[_Union[_common_pb2.RecomputeCost, _Mapping]] = ..., error_p50: _Optional[float] = ..., error_p95: _Optional[float] = ...) -> None: ...

class CheckpointRow(_message.Message):
    __slots__ = ("checkpoint", "copies", "recomputes")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTES_FIELD_NUMBER: _ClassVar[int]
    checkpoint: _common_pb2.Checkpoint
    copies: _containers.RepeatedCompositeFieldContainer[CheckpointCopy]
    recomputes: _containers.RepeatedCompositeFieldContainer[RecomputeRow]
    def __init__(self, checkpoint: _Optional[_Union[_common_pb2.Checkpoint, _Mapping]] = ..., copies: _Optional[_Iterable[_Union[CheckpointCopy, _Mapping]]] = ..., recomputes: _Optional[_Iterable[_Union[RecomputeRow, _Mapping]]] = ...) -> None: ...

class CheckpointList(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointRow]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[CheckpointRow, _Mapping]]] = ...) -> None: ...

class RemoveCheckpointRequest(_message.Message):
    __slots__ = ("request_id", "name", "nodes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    nodes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., nodes: _Optional[_Iterable[str]] = ...) -> None: ...

class VerifyCheckpointRequest(_message.Message):
    __slots__ = ("request_id", "name", "nodes", "deep")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    DEEP_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    nodes: _containers.RepeatedScalarFieldContainer[str]
    deep: bool
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., nodes: _Optional[_Iterable[str]] = ..., deep: bool = ...) -> None: ...

class DeployRequest(_message.Message):
    __slots__ = ("request_id", "spec")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    spec: _common_pb2.DeploymentSpec
    def __init__(self, request_id: _Optional[str] = ..., spec: _Optional[_Union[_common_pb2.DeploymentSpec, _Mapping]] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("request_id", "name")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("request_id", "name", "replicas", "min_replicas", "max_replicas")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., replicas: _Optional[int] = ..., min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ...) -> None: ...

class MigrateRequest(_message.Message):
    __slots__ = ("request_id", "request", "replica", "node")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    request: str
    replica: str
    node: str
    def __init__(self, request_id: _Optional[str] = ..., request: _Optional[str] = ..., replica: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("request_id", "node", "deadline_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    node: str
    deadline_s: float
    def __init__(self, request_id: _Optional[str] = ..., node: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class CordonRequest(_message.Message):
    __slots__ = ("request_id", "node", "device", "cordoned")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CORDONED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    node: str
    device: str
    cordoned: bool
    def __init__(self, request_id: _Optional[str] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., cordoned: bool = ...) -> None: ...

class PlannedMove(_message.Message):
    __slots__ = ("request", "source", "source_node", "target", "target_node", "move", "pause_s", "left_s", "why")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_NODE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TARGET_NODE_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    request: str
    source: str
    source_node: str
    target: str
    target_node: str
    move: bool
    pause_s: float
    left_s: float
    why: str
    def __init__(self, request: _Optional[str] = ..., source: _Optional[str] = ..., source_node: _Optional[str] = ..., target: _Optional[str] = ..., target_node: _Optional[str] = ..., move: bool = ..., pause_s: _Optional[float] = ..., left_s: _Optional[float] = ..., why: _Optional[str] = ...) -> None: ...

class MigrationPlan(_message.Message):
    __slots__ = ("moves", "starts", "why")
    MOVES_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[PlannedMove]
    starts: _containers.RepeatedScalarFieldContainer[str]
    why: str
    def __init__(self, moves: _Optional[_Iterable[_Union[PlannedMove, _Mapping]]] = ..., starts: _Optional[_Iterable[str]] = ..., why: _Optional[str] = ...) -> None: ...

class WatchOperationRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeploymentRow(_message.Message):
    __slots__ = ("deployment", "state", "reason", "ready_replicas", "wanted_replicas", "running_requests", "held_requests")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    READY_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WANTED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    HELD_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    deployment: _common_pb2.Deployment
    state: _common_pb2.DeploymentState
    reason: str
    ready_replicas: int
    wanted_replicas: int
    running_requests: int
    held_requests: int
    def __init__(self, deployment: _Optional[_Union[_common_pb2.Deployment, _Mapping]] = ..., state: _Optional[_Union[_common_pb2.DeploymentState, str]] = ..., reason: _Optional[str] = ..., ready_replicas: _Optional[int] = ..., wanted_replicas: _Optional[int] = ..., running_requests: _Optional[int] = ..., held_requests: _Optional[int] = ...) -> None: ...

class ReplicaRow(_message.Message):
    __slots__ = ("node", "status")
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    node: str
    status: _common_pb2.ReplicaStatus
    def __init__(self, node: _Optional[str] = ..., status: _Optional[_Union[_common_pb2.ReplicaStatus, _Mapping]] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("version", "deployments", "replicas", "nodes", "estimator")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    version: str
    deployments: _containers.RepeatedCompositeFieldContainer[DeploymentRow]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaRow]
    nodes: _containers.RepeatedCompositeFieldContainer[_common_pb2.Node]
    estimator: _common_pb2.EstimatorError
    def __init__(self, version: _Optional[str] = ..., deployments: _Optional[_Iterable[_Union[DeploymentRow, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaRow, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[_common_pb2.Node, _Mapping]]] = ..., estimator: _Optional[_Union[_common_pb2.EstimatorError, _Mapping]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("target",)
    TARGET_FIELD_NUMBER: _ClassVar[int]
    target: str
    def __init__(self, target: _Optional[str] = ...) -> None: ...

class RequestList(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[_common_pb2.RequestRow]
    def __init__(self, requests: _Optional[_Iterable[_Union[_common_pb2.RequestRow, _Mapping]]] = ...) -> None: ...

class ReadLogsRequest(_message.Message):
    __slots__ = ("target", "lines")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    target: str
    lines: int
    def __init__(self, target: _Optional[str] = ..., lines: _Optional[int] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("epoch", "heartbeat_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    heartbeat_s: float
    def __init__(self, epoch: _Optional[int] = ..., heartbeat_s: _Optional[float] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("name", "incarnation", "revision", "report")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    revision: int
    report: _common_pb2.NodeReport
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., revision: _Optional[int] = ..., report: _Optional[_Union[_common_pb2.NodeReport, _Mapping]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("epoch", "resync")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    resync: bool
    def __init__(self, epoch: _Optional[int] = ..., resync: bool = ...) -> None: ...

class WatchRoutesRequest(_message.Message):
    __slots__ = ("gateway",)
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    gateway: str
    def __init__(self, gateway: _Optional[str] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("gateway", "request_id", "deployment", "timeout_s", "prompt_tokens", "started_at")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    gateway: str
    request_id: str
    deployment: str
    timeout_s: float
    prompt_tokens: int
    started_at: float
    def __init__(self, gateway: _Optional[str] = ..., request_id: _Optional[str] = ..., deployment: _Optional[str] = ..., timeout_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., started_at: _Optional[float] = ...) -> None: ...

class AcquireUpdate(_message.Message):
    __slots__ = ("phase", "progress", "target")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    phase: str
    progress: float
    target: _common_pb2.RouteTarget
    def __init__(self, phase: _Optional[str] = ..., progress: _Optional[float] = ..., target: _Optional[_Union[_common_pb2.RouteTarget, _Mapping]] = ...) -> None: ...

class ReportLoadRequest(_message.Message):
    __slots__ = ("gateway", "requests", "finished", "incarnation")
    class FinishedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    gateway: str
    requests: _containers.RepeatedCompositeFieldContainer[_common_pb2.RequestRow]
    finished: _containers.ScalarMap[str, int]
    incarnation: str
    def __init__(self, gateway: _Optional[str] = ..., requests: _Optional[_Iterable[_Union[_common_pb2.RequestRow, _Mapping]]] = ..., finished: _Optional[_Mapping[str, int]] = ..., incarnation: _Optional[str] = ...) -> None: ...
