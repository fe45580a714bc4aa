from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_REMOTE: _ClassVar[Tier]
    TIER_SSD: _ClassVar[Tier]
    TIER_DRAM: _ClassVar[Tier]
    TIER_DEVICE: _ClassVar[Tier]

class ResidencyState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENCY_STATE_UNSPECIFIED: _ClassVar[ResidencyState]
    RESIDENCY_STATE_LOADING: _ClassVar[ResidencyState]
    RESIDENCY_STATE_READY: _ClassVar[ResidencyState]
    RESIDENCY_STATE_QUARANTINED: _ClassVar[ResidencyState]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_REQUEST: _ClassVar[Priority]
    PRIORITY_PREWARM: _ClassVar[Priority]
    PRIORITY_PREFETCH: _ClassVar[Priority]

class DeviceKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEVICE_KIND_UNSPECIFIED: _ClassVar[DeviceKind]
    DEVICE_KIND_CPU: _ClassVar[DeviceKind]
    DEVICE_KIND_CUDA: _ClassVar[DeviceKind]

class DeviceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEVICE_STATE_UNSPECIFIED: _ClassVar[DeviceState]
    DEVICE_STATE_FREE: _ClassVar[DeviceState]
    DEVICE_STATE_LEASED: _ClassVar[DeviceState]
    DEVICE_STATE_DIRTY: _ClassVar[DeviceState]
    DEVICE_STATE_LOST: _ClassVar[DeviceState]

class DeploymentState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEPLOYMENT_STATE_UNSPECIFIED: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_READY: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_STARTING: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_SLEEPING: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_WAITING: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_FAILED: _ClassVar[DeploymentState]
    DEPLOYMENT_STATE_DELETING: _ClassVar[DeploymentState]

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_STARTING: _ClassVar[ReplicaState]
    REPLICA_STATE_READY: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
    REPLICA_STATE_STOPPING: _ClassVar[ReplicaState]
    REPLICA_STATE_FAILED: _ClassVar[ReplicaState]

class StartPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    START_PHASE_UNSPECIFIED: _ClassVar[StartPhase]
    START_PHASE_QUEUED: _ClassVar[StartPhase]
    START_PHASE_LOADING: _ClassVar[StartPhase]
    START_PHASE_FORKING: _ClassVar[StartPhase]
    START_PHASE_BUILDING: _ClassVar[StartPhase]
    START_PHASE_READY: _ClassVar[StartPhase]

class NodeState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_STATE_UNSPECIFIED: _ClassVar[NodeState]
    NODE_STATE_JOINING: _ClassVar[NodeState]
    NODE_STATE_READY: _ClassVar[NodeState]
    NODE_STATE_SUSPECT: _ClassVar[NodeState]
    NODE_STATE_DRAINING: _ClassVar[NodeState]
    NODE_STATE_CORDONED: _ClassVar[NodeState]
    NODE_STATE_DEAD: _ClassVar[NodeState]

class RequestState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_STATE_UNSPECIFIED: _ClassVar[RequestState]
    REQUEST_STATE_HELD: _ClassVar[RequestState]
    REQUEST_STATE_RUNNING: _ClassVar[RequestState]

class OperationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATE_UNSPECIFIED: _ClassVar[OperationState]
    OPERATION_STATE_RUNNING: _ClassVar[OperationState]
    OPERATION_STATE_DONE: _ClassVar[OperationState]
    OPERATION_STATE_FAILED: _ClassVar[OperationState]

class MigrationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MIGRATION_STATE_UNSPECIFIED: _ClassVar[MigrationState]
    MIGRATION_STATE_QUEUED: _ClassVar[MigrationState]
    MIGRATION_STATE_ROUNDS: _ClassVar[MigrationState]
    MIGRATION_STATE_MOVED: _ClassVar[MigrationState]
    MIGRATION_STATE_FINISHED: _ClassVar[MigrationState]
    MIGRATION_STATE_CANCELLED: _ClassVar[MigrationState]
    MIGRATION_STATE_FAILED: _ClassVar[MigrationState]

class Basis(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BASIS_UNSPECIFIED: _ClassVar[Basis]
    BASIS_REPORTED: _ClassVar[Basis]
    BASIS_MEASURED: _ClassVar[Basis]
    BASIS_SIMILAR: _ClassVar[Basis]
    BASIS_GUESSED: _ClassVar[Basis]

class WaitsOn(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAITS_ON_UNSPECIFIED: _ClassVar[WaitsOn]
    WAITS_ON_NODES: _ClassVar[WaitsOn]
    WAITS_ON_DEVICES: _ClassVar[WaitsOn]
    WAITS_ON_MEMORY: _ClassVar[WaitsOn]
TIER_REMOTE: Tier
TIER_SSD: Tier
TIER_DRAM: Tier
TIER_DEVICE: Tier
RESIDENCY_STATE_UNSPECIFIED: ResidencyState
RESIDENCY_STATE_LOADING: ResidencyState
RESIDENCY_STATE_READY: ResidencyState
RESIDENCY_STATE_QUARANTINED: ResidencyState
PRIORITY_REQUEST: Priority
PRIORITY_PREWARM: Priority
PRIORITY_PREFETCH: Priority
DEVICE_KIND_UNSPECIFIED: DeviceKind
DEVICE_KIND_CPU: DeviceKind
DEVICE_KIND_CUDA: DeviceKind
DEVICE_STATE_UNSPECIFIED: DeviceState
DEVICE_STATE_FREE: DeviceState
DEVICE_STATE_LEASED: DeviceState
DEVICE_STATE_DIRTY: DeviceState
DEVICE_STATE_LOST: DeviceState
DEPLOYMENT_STATE_UNSPECIFIED: DeploymentState
DEPLOYMENT_STATE_READY: DeploymentState
DEPLOYMENT_STATE_STARTING: DeploymentState
DEPLOYMENT_STATE_SLEEPING: DeploymentState
DEPLOYMENT_STATE_WAITING: DeploymentState
DEPLOYMENT_STATE_FAILED: DeploymentState
DEPLOYMENT_STATE_DELETING: DeploymentState
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_STARTING: ReplicaState
REPLICA_STATE_READY: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_STOPPING: ReplicaState
REPLICA_STATE_FAILED: ReplicaState
START_PHASE_UNSPECIFIED: StartPhase
START_PHASE_QUEUED: StartPhase
START_PHASE_LOADING: StartPhase
START_PHASE_FORKING: StartPhase
START_PHASE_BUILDING: StartPhase
START_PHASE_READY: StartPhase
NODE_STATE_UNSPECIFIED: NodeState
NODE_STATE_JOINING: NodeState
NODE_STATE_READY: NodeState
NODE_STATE_SUSPECT: NodeState
NODE_STATE_DRAINING: NodeState
NODE_STATE_CORDONED: NodeState
NODE_STATE_DEAD: NodeState
REQUEST_STATE_UNSPECIFIED: RequestState
REQUEST_STATE_HELD: RequestState
REQUEST_STATE_RUNNING: RequestState
OPERATION_STATE_UNSPECIFIED: OperationState
OPERATION_STATE_RUNNING: OperationState
OPERATION_STATE_DONE: OperationState
OPERATION_STATE_FAILED: OperationState
MIGRATION_STATE_UNSPECIFIED: MigrationState
MIGRATION_STATE_QUEUED: MigrationState
MIGRATION_STATE_ROUNDS: MigrationState
MIGRATION_STATE_MOVED: MigrationState
MIGRATION_STATE_FINISHED: MigrationState
MIGRATION_STATE_CANCELLED: MigrationState
MIGRATION_STATE_FAILED: MigrationState
BASIS_UNSPECIFIED: Basis
BASIS_REPORTED: Basis
BASIS_MEASURED: Basis
BASIS_SIMILAR: Basis
BASIS_GUESSED: Basis
WAITS_ON_UNSPECIFIED: WaitsOn
WAITS_ON_NODES: WaitsOn
WAITS_ON_DEVICES: WaitsOn
WAITS_ON_MEMORY: WaitsOn

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "message", "hint", "retry_after_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    hint: str
    retry_after_s: float
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("name", "digest", "size_bytes", "architecture", "dtype", "tensor_count", "max_model_len", "source", "created_at")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    size_bytes: int
    architecture: str
    dtype: str
    tensor_count: int
    max_model_len: int
    source: str
    created_at: float
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., tensor_count: _Optional[int] = ..., max_model_len: _Optional[int] = ..., source: _Optional[str] = ..., created_at: _Optional[float] = ...) -> None: ...

class ExecutionFile(_message.Message):
    __slots__ = ("path", "content")
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    path: str
    content: bytes
    def __init__(self, path: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class Residency(_message.Message):
    __slots__ = ("checkpoint", "digest", "tier", "state", "size_bytes", "generation")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    digest: str
    tier: Tier
    state: ResidencyState
    size_bytes: int
    generation: int
    def __init__(self, checkpoint: _Optional[str] = ..., digest: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., state: _Optional[_Union[ResidencyState, str]] = ..., size_bytes: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class TierUsage(_message.Message):
    __slots__ = ("tier", "capacity_bytes", "used_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    capacity_bytes: int
    used_bytes: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("id", "kind", "state", "memory_bytes", "model", "threads", "memory_used_bytes", "utilization_percent")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_PERCENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: DeviceKind
    state: DeviceState
    memory_bytes: int
    model: str
    threads: int
    memory_used_bytes: int
    utilization_percent: int
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[_Union[DeviceKind, str]] = ..., state: _Optional[_Union[DeviceState, str]] = ..., memory_bytes: _Optional[int] = ..., model: _Optional[str] = ..., threads: _Optional[int] = ..., memory_used_bytes: _Optional[int] = ..., utilization_percent: _Optional[int] = ...) -> None: ...

class DeploymentSpec(_message.Message):
    __slots__ = ("name", "checkpoint", "min_replicas", "max_replicas", "devices", "keep_alive_s", "target_concurrency", "max_model_len", "engine_args")
    class EngineArgsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_S_FIELD_NUMBER: _ClassVar[int]
    TARGET_CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ARGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    checkpoint: str
    min_replicas: int
    max_replicas: int
    devices: int
    keep_alive_s: float
    target_concurrency: int
    max_model_len: int
    engine_args: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., checkpoint: _Optional[str] = ..., min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ..., devices: _Optional[int] = ..., keep_alive_s: _Optional[float] = ..., target_concurrency: _Optional[int] = ..., max_model_len: _Optional[int] = ..., engine_args: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Deployment(_message.Message):
    __slots__ = ("spec", "revision", "digest", "created_at", "updated_at", "deleting")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    DELETING_FIELD_NUMBER: _ClassVar[int]
    spec: DeploymentSpec
    revision: int
    digest: str
    created_at: float
    updated_at: float
    deleting: bool
    def __init__(self, spec: _Optional[_Union[DeploymentSpec, _Mapping]] = ..., revision: _Optional[int] = ..., digest: _Optional[str] = ..., created_at: _Optional[float] = ..., updated_at: _Optional[float] = ..., deleting: bool = ...) -> None: ...

class ReplicaSpec(_message.Message):
    __slots__ = ("id", "deployment", "revision", "generation", "checkpoint", "digest", "devices", "capacity", "max_model_len", "engine_args")
    class EngineArgsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ARGS_FIELD_NUMBER: _ClassVar[int]
    id: str
    deployment: str
    revision: int
    generation: int
    checkpoint: str
    digest: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    capacity: int
    max_model_len: int
    engine_args: _containers.ScalarMap[str, str]
    def __init__(self, id: _Optional[str] = ..., deployment: _Optional[str] = ..., revision: _Optional[int] = ..., generation: _Optional[int] = ..., checkpoint: _Optional[str] = ..., digest: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ..., capacity: _Optional[int] = ..., max_model_len: _Optional[int] = ..., engine_args: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("spec", "state", "phase", "progress", "address", "pid", "error", "error_reason", "phases_s", "started_at", "ready_at", "running", "waiting", "memory_bytes")
    class PhasesSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    PHASES_S_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    READY_AT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    spec: ReplicaSpec
    state: ReplicaState
    phase: StartPhase
    progress: float
    address: str
    pid: int
    error: str
    error_reason: str
    phases_s: _containers.ScalarMap[str, float]
    started_at: float
    ready_at: float
    running: int
    waiting: int
    memory_bytes: int
    def __init__(self, spec: _Optional[_Union[ReplicaSpec, _Mapping]] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., phase: _Optional[_Union[StartPhase, str]] = ..., progress: _Optional[float] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., error: _Optional[str] = ..., error_reason: _Optional[str] = ..., phases_s: _Optional[_Mapping[str, float]] = ..., started_at: _Optional[float] = ..., ready_at: _Optional[float] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., memory_bytes: _Optional[int] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("number", "digest", "size_bytes", "tier", "queue_s", "read_s")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    READ_S_FIELD_NUMBER: _ClassVar[int]
    number: int
    digest: str
    size_bytes: int
    tier: Tier
    queue_s: float
    read_s: float
    def __init__(self, number: _Optional[int] = ..., digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., tier: _Optional[_Union[Tier, str]] = ..., queue_s: _Optional[float] = ..., read_s: _Optional[float] = ...) -> None: ...

class NodeReport(_message.Message):
    __slots__ = ("name", "incarnation", "revision", "address", "version", "engine", "warm", "devices", "tiers", "residencies", "checkpoints", "replicas", "architectures", "loads", "probe")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    WARM_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    RESIDENCIES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURES_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    revision: int
    address: str
    version: str
    engine: str
    warm: bool
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    tiers: _containers.RepeatedCompositeFieldContainer[TierUsage]
    residencies: _containers.RepeatedCompositeFieldContainer[Residency]
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    architectures: _containers.RepeatedScalarFieldContainer[str]
    loads: _containers.RepeatedCompositeFieldContainer[LoadReport]
    probe: LoadReport
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., revision: _Optional[int] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., engine: _Optional[str] = ..., warm: bool = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., tiers: _Optional[_Iterable[_Union[TierUsage, _Mapping]]] = ..., residencies: _Optional[_Iterable[_Union[Residency, _Mapping]]] = ..., checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., architectures: _Optional[_Iterable[str]] = ..., loads: _Optional[_Iterable[_Union[LoadReport, _Mapping]]] = ..., probe: _Optional[_Union[LoadReport, _Mapping]] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("report", "state", "last_seen", "cordoned", "cordoned_devices")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    CORDONED_FIELD_NUMBER: _ClassVar[int]
    CORDONED_DEVICES_FIELD_NUMBER: _ClassVar[int]
    report: NodeReport
    state: NodeState
    last_seen: float
    cordoned: bool
    cordoned_devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, report: _Optional[_Union[NodeReport, _Mapping]] = ..., state: _Optional[_Union[NodeState, str]] = ..., last_seen: _Optional[float] = ..., cordoned: bool = ..., cordoned_devices: _Optional[_Iterable[str]] = ...) -> None: ...

class RequestRow(_message.Message):
    __slots__ = ("id", "deployment", "state", "replica", "prompt_tokens", "output_tokens", "started_at", "node", "max_tokens", "interval_s", "moves", "choices")
    ID_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    id: str
    deployment: str
    state: RequestState
    replica: str
    prompt_tokens: int
    output_tokens: int
    started_at: float
    node: str
    max_tokens: int
    interval_s: float
    moves: int
    choices: int
    def __init__(self, id: _Optional[str] = ..., deployment: _Optional[str] = ..., state: _Optional[_Union[RequestState, str]] = ..., replica: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., started_at: _Optional[float] = ..., node: _Optional[str] = ..., max_tokens: _Optional[int] = ..., interval_s: _Optional[float] = ..., moves: _Optional[int] = ..., choices: _Optional[int] = ...) -> None: ...

class RouteTarget(_message.Message):
    __slots__ = ("replica", "node", "address", "generation", "revision", "capacity")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    replica: str
    node: str
    address: str
    generation: int
    revision: int
    capacity: int
    def __init__(self, replica: _Optional[str] = ..., node: _Optional[str] = ..., address: _Optional[str] = ..., generation: _Optional[int] = ..., revision: _Optional[int] = ..., capacity: _Optional[int] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("deployment", "max_model_len", "targets", "sources")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    max_model_len: int
    targets: _containers.RepeatedCompositeFieldContainer[RouteTarget]
    sources: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ..., max_model_len: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[RouteTarget, _Mapping]]] = ..., sources: _Optional[_Iterable[str]] = ...) -> None: ...

class RouteTable(_message.Message):
    __slots__ = ("epoch", "revision", "routes")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    revision: int
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    def __init__(self, epoch: _Optional[int] = ..., revision: _Optional[int] = ..., routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("id", "kind", "target", "state", "phase", "progress", "error", "error_reason", "hint", "created_at", "updated_at")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    target: str
    state: OperationState
    phase: str
    progress: float
    error: str
    error_reason: str
    hint: str
    created_at: float
    updated_at: float
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., target: _Optional[str] = ..., state: _Optional[_Union[OperationState, str]] = ..., phase: _Optional[str] = ..., progress: _Optional[float] = ..., error: _Optional[str] = ..., error_reason: _Optional[str] = ..., hint: _Optional[str] = ..., created_at: _Optional[float] = ..., updated_at: _Optional[float] = ...) -> None: ...

class LogChunk(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class RecomputeCost(_message.Message):
    __slots__ = ("per_token_s", "fixed_s", "observations")
    PER_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    FIXED_S_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    per_token_s: float
    fixed_s: float
    observations: int
    def __init__(self, per_token_s: _Optional[float] = ..., fixed_s: _Optional[float] = ..., observations: _Optional[int] = ...) -> None: ...

class MigrationOrder(_message.Message):
    __slots__ = ("id", "replica", "generation", "target", "requests", "concurrency", "within_s", "cost")
    ID_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    id: str
    replica: str
    generation: int
    target: RouteTarget
    requests: _containers.RepeatedScalarFieldContainer[str]
    concurrency: int
    within_s: float
    cost: RecomputeCost
    def __init__(self, id: _Optional[str] = ..., replica: _Optional[str] = ..., generation: _Optional[int] = ..., target: _Optional[_Union[RouteTarget, _Mapping]] = ..., requests: _Optional[_Iterable[str]] = ..., concurrency: _Optional[int] = ..., within_s: _Optional[float] = ..., cost: _Optional[_Union[RecomputeCost, _Mapping]] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("tokens", "cached_tokens", "seconds")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    cached_tokens: int
    seconds: float
    def __init__(self, tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class MigrationReport(_message.Message):
    __slots__ = ("migration", "request", "state", "rounds", "prompt_tokens", "output_tokens", "sent_bytes", "last_round", "predicted_pause_s", "error", "error_reason")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    migration: str
    request: str
    state: MigrationState
    rounds: int
    prompt_tokens: int
    output_tokens: int
    sent_bytes: int
    last_round: Round
    predicted_pause_s: float
    error: str
    error_reason: str
    def __init__(self, migration: _Optional[str] = ..., request: _Optional[str] = ..., state: _Optional[_Union[MigrationState, str]] = ..., rounds: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., last_round: _Optional[_Union[Round, _Mapping]] = ..., predicted_pause_s: _Optional[float] = ..., error: _Optional[str] = ..., error_reason: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("seconds", "basis", "observations")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    basis: Basis
    observations: int
    def __init__(self, seconds: _Optional[float] = ..., basis: _Optional[_Union[Basis, str]] = ..., observations: _Optional[int] = ...) -> None: ...

class Estimate(_message.Message):
    __slots__ = ("queued", "warming", "forking", "loading", "building", "tier", "size_bytes", "ahead_bytes")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    WARMING_FIELD_NUMBER: _ClassVar[int]
    FORKING_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    BUILDING_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    AHEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    queued: Part
    warming: Part
    forking: Part
    loading: Part
    building: Part
    tier: Tier
    size_bytes: int
    ahead_bytes: int
    def __init__(self, queued: _Optional[_Union[Part, _Mapping]] = ..., warming: _Optional[_Union[Part, _Mapping]] = ..., forking: _Optional[_Union[Part, _Mapping]] = ..., loading: _Optional[_Union[Part, _Mapping]] = ..., building: _Optional[_Union[Part, _Mapping]] = ..., tier: _Optional[_Union[Tier, str]] = ..., size_bytes: _Optional[int] = ..., ahead_bytes: _Optional[int] = ...) -> None: ...

class EstimatorError(_message.Message):
    __slots__ = ("count", "p50", "p95", "guessed")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    P95_FIELD_NUMBER: _ClassVar[int]
    GUESSED_FIELD_NUMBER: _ClassVar[int]
    count: int
    p50: float
    p95: float
    guessed: int
    def __init__(self, count: _Optional[int] = ..., p50: _Optional[float] = ..., p95: _Optional[float] = ..., guessed: _Optional[int] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("node", "refused", "waits_on", "estimate")
    NODE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    WAITS_ON_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    node: str
    refused: str
    waits_on: WaitsOn
    estimate: Estimate
    def __init__(self, node: _Optional[str] = ..., refused: _Optional[str] = ..., waits_on: _Optional[_Union[WaitsOn, str]] = ..., estimate: _Optional[_Union[Estimate, _Mapping]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("replica", "deployment", "revision", "node", "devices", "priority", "decided_at", "why", "estimate", "candidates", "omitted", "state", "phases_s", "ready_at", "error")
    class PhasesSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DECIDED_AT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    OMITTED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PHASES_S_FIELD_NUMBER: _ClassVar[int]
    READY_AT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    replica: str
    deployment: str
    revision: int
    node: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    priority: Priority
    decided_at: float
    why: str
    estimate: Estimate
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    omitted: int
    state: ReplicaState
    phases_s: _containers.ScalarMap[str, float]
    ready_at: float
    error: str
    def __init__(self, replica: _Optional[str] = ..., deployment: _Optional[str] = ..., revision: _Optional[int] = ..., node: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., decided_at: _Optional[float] = ..., why: _Optional[str] = ..., estimate: _Optional[_Union[Estimate, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., omitted: _Optional[int] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., phases_s: _Optional[_Mapping[str, float]] = ..., ready_at: _Optional[float] = ..., error: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("deployment", "waits_for", "candidates", "request", "held_at", "granted_at", "decisions")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    HELD_AT_FIELD_NUMBER: _ClassVar[int]
    GRANTED_AT_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    waits_for: str
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    request: RequestRow
    held_at: float
    granted_at: float
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    def __init__(self, deployment: _Optional[str] = ..., waits_for: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., request: _Optional[_Union[RequestRow, _Mapping]] = ..., held_at: _Optional[float] = ..., granted_at: _Optional[float] = ..., decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ...) -> None: ...

class PlannedStart(_message.Message):
    __slots__ = ("node", "devices", "why", "estimate")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    node: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    why: str
    estimate: Estimate
    def __init__(self, node: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ..., why: _Optional[str] = ..., estimate: _Optional[_Union[Estimate, _Mapping]] = ...) -> None: ...

class PlannedStop(_message.Message):
    __slots__ = ("replica", "deployment", "node", "why")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    replica: str
    deployment: str
    node: str
    why: str
    def __init__(self, replica: _Optional[str] = ..., deployment: _Optional[str] = ..., node: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class DeploymentPlan(_message.Message):
    __slots__ = ("deployment", "revision", "starts", "stops", "waits_for", "ready_s", "candidates")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    STOPS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    READY_S_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    revision: int
    starts: _containers.RepeatedCompositeFieldContainer[PlannedStart]
    stops: _containers.RepeatedCompositeFieldContainer[PlannedStop]
    waits_for: str
    ready_s: float
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    def __init__(self, deployment: _Optional[str] = ..., revision: _Optional[int] = ..., starts: _Optional[_Iterable[_Union[PlannedStart, _Mapping]]] = ..., stops: _Optional[_Iterable[_Union[PlannedStop, _Mapping]]] = ..., waits_for: _Optional[str] = ..., ready_s: _Optional[float] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("heartbeat_s", "suspect_s", "dead_s", "drain_s", "start_backoff_s", "max_start_failures", "stable_after_s", "min_loaded_s", "prefetch", "max_copies", "swap_hold_s", "displace")
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_S_FIELD_NUMBER: _ClassVar[int]
    DEAD_S_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    START_BACKOFF_S_FIELD_NUMBER: _ClassVar[int]
    MAX_START_FAILURES_FIELD_NUMBER: _ClassVar[int]
    STABLE_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    MIN_LOADED_S_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    MAX_COPIES_FIELD_NUMBER: _ClassVar[int]
    SWAP_HOLD_S_FIELD_NUMBER: _ClassVar[int]
    DISPLACE_FIELD_NUMBER: _ClassVar[int]
    heartbeat_s: float
    suspect_s: float
    dead_s: float
    drain_s: float
    start_backoff_s: float
    max_start_failures: int
    stable_after_s: float
    min_loaded_s: float
    prefetch: bool
    max_copies: int
    swap_hold_s: float
    displace: bool
    def __init__(self, heartbeat_s: _Optional[float] = ..., suspect_s: _Optional[float] = ..., dead_s: _Optional[float] = ..., drain_s: _Optional[float] = ..., start_backoff_s: _Optional[float] = ..., max_start_failures: _Optional[int] = ..., stable_after_s: _Optional[float] = ..., min_loaded_s: _Optional[float] = ..., prefetch: bool = ..., max_copies: _Optional[int] = ..., swap_hold_s: _Optional[float] = ..., displace: bool = ...) -> None: ...

class Level(_message.Message):
    __slots__ = ("value", "observations")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    value: float
    observations: int
    def __init__(self, value: _Optional[float] = ..., observations: _Optional[int] = ...) -> None: ...

class StartTimes(_message.Message):
    __slots__ = ("grant", "fork", "whole", "rest")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    REST_FIELD_NUMBER: _ClassVar[int]
    grant: Level
    fork: Level
    whole: Level
    rest: Level
    def __init__(self, grant: _Optional[_Union[Level, _Mapping]] = ..., fork: _Optional[_Union[Level, _Mapping]] = ..., whole: _Optional[_Union[Level, _Mapping]] = ..., rest: _Optional[_Union[Level, _Mapping]] = ...) -> None: ...

class KnownReading(_message.Message):
    __slots__ = ("node", "tier", "level")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    node: str
    tier: Tier
    level: Level
    def __init__(self, node: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., level: _Optional[_Union[Level, _Mapping]] = ...) -> None: ...

class KnownStarts(_message.Message):
    __slots__ = ("digest", "kind", "times")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    kind: DeviceKind
    times: StartTimes
    def __init__(self, digest: _Optional[str] = ..., kind: _Optional[_Union[DeviceKind, str]] = ..., times: _Optional[_Union[StartTimes, _Mapping]] = ...) -> None: ...

class KnownRecompute(_message.Message):
    __slots__ = ("digest", "kind", "cost")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    kind: DeviceKind
    cost: RecomputeCost
    def __init__(self, digest: _Optional[str] = ..., kind: _Optional[_Union[DeviceKind, str]] = ..., cost: _Optional[_Union[RecomputeCost, _Mapping]] = ...) -> None: ...

class DescribedReplica(_message.Message):
    __slots__ = ("node", "status")
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    node: str
    status: ReplicaStatus
    def __init__(self, node: _Optional[str] = ..., status: _Optional[_Union[ReplicaStatus, _Mapping]] = ...) -> None: ...

class DescribedDeployment(_message.Message):
    __slots__ = ("deployment", "max_model_len", "size_bytes", "needed", "unneeded_s")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    UNNEEDED_S_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    max_model_len: int
    size_bytes: int
    needed: int
    unneeded_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ..., max_model_len: _Optional[int] = ..., size_bytes: _Optional[int] = ..., needed: _Optional[int] = ..., unneeded_s: _Optional[_Iterable[float]] = ...) -> None: ...

class ClusterDescription(_message.Message):
    __slots__ = ("policy", "nodes", "deployments", "replicas", "requests", "reading", "starts", "recomputes")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    READING_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTES_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    deployments: _containers.RepeatedCompositeFieldContainer[DescribedDeployment]
    replicas: _containers.RepeatedCompositeFieldContainer[DescribedReplica]
    requests: _containers.RepeatedCompositeFieldContainer[RequestRow]
    reading: _containers.RepeatedCompositeFieldContainer[KnownReading]
    starts: _containers.RepeatedCompositeFieldContainer[KnownStarts]
    recomputes: _containers.RepeatedCompositeFieldContainer[KnownRecompute]
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., deployments: _Optional[_Iterable[_Union[DescribedDeployment, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[DescribedReplica, _Mapping]]] = ..., requests: _Optional[_Iterable[_Union[RequestRow, _Mapping]]] = ..., reading: _Optional[_Iterable[_Union[KnownReading, _Mapping]]] = ..., starts: _Optional[_Iterable[_Union[KnownStarts, _Mapping]]] = ..., recomputes: _Optional[_Iterable[_Union[KnownRecompute, _Mapping]]] = ...) -> None: ...
