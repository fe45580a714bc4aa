from sllm.rpc import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AgentAddCheckpointRequest(_message.Message):
    __slots__ = ("epoch", "operation", "name", "source")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    operation: str
    name: str
    source: str
    def __init__(self, epoch: _Optional[int] = ..., operation: _Optional[str] = ..., name: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class AddProgress(_message.Message):
    __slots__ = ("done_bytes", "total_bytes", "checkpoint")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    checkpoint: _common_pb2.Checkpoint
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., checkpoint: _Optional[_Union[_common_pb2.Checkpoint, _Mapping]] = ...) -> None: ...

class AgentRemoveCheckpointRequest(_message.Message):
    __slots__ = ("epoch", "name")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    name: str
    def __init__(self, epoch: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class AgentVerifyCheckpointRequest(_message.Message):
    __slots__ = ("epoch", "name", "deep")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    name: str
    deep: bool
    def __init__(self, epoch: _Optional[int] = ..., name: _Optional[str] = ..., deep: bool = ...) -> None: ...

class StartReplicaRequest(_message.Message):
    __slots__ = ("epoch", "spec", "priority")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    spec: _common_pb2.ReplicaSpec
    priority: _common_pb2.Priority
    def __init__(self, epoch: _Optional[int] = ..., spec: _Optional[_Union[_common_pb2.ReplicaSpec, _Mapping]] = ..., priority: _Optional[_Union[_common_pb2.Priority, str]] = ...) -> None: ...

class StopReplicaRequest(_message.Message):
    __slots__ = ("epoch", "replica", "generation", "drain_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    replica: str
    generation: int
    drain_s: float
    def __init__(self, epoch: _Optional[int] = ..., replica: _Optional[str] = ..., generation: _Optional[int] = ..., drain_s: _Optional[float] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("epoch", "spec", "instead_of")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    INSTEAD_OF_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    spec: _common_pb2.ReplicaSpec
    instead_of: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., spec: _Optional[_Union[_common_pb2.ReplicaSpec, _Mapping]] = ..., instead_of: _Optional[_Iterable[str]] = ...) -> None: ...

class MigrateCommand(_message.Message):
    __slots__ = ("epoch", "order")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    order: _common_pb2.MigrationOrder
    def __init__(self, epoch: _Optional[int] = ..., order: _Optional[_Union[_common_pb2.MigrationOrder, _Mapping]] = ...) -> None: ...

class GetExecutionFilesRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class AgentReadLogsRequest(_message.Message):
    __slots__ = ("replica", "lines")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    replica: str
    lines: int
    def __init__(self, replica: _Optional[str] = ..., lines: _Optional[int] = ...) -> None: ...
