"""AgentService: the controller's commands to an agent, and where gateways get execution files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from sllm.core.checkpoint import Checkpoint, ExecutionFile
from sllm.core.ids import CheckpointName, OperationId, ReplicaId
from sllm.core.migration import MigrationOrder, MigrationReport
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaSpec
from sllm.rpc import agent_pb2, common_pb2
from sllm.rpc.control import Empty, LogChunk
from sllm.rpc.transport import Client, Handlers, Method


@dataclass(frozen=True, slots=True, kw_only=True)
class AddCheckpointCommand:
    """Repeating it with the same name and source attaches to the work under way, or finds it done."""

    epoch: int
    operation: OperationId
    name: CheckpointName
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddProgress:
    """The last one has the `checkpoint`."""

    done_bytes: int
    total_bytes: int
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveCheckpointCommand:
    epoch: int
    name: CheckpointName


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyCheckpointCommand:
    """`deep`: the sha256 of all bytes, not only the hash of each chunk. A damaged copy is used no more."""

    epoch: int
    name: CheckpointName
    deep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplicaCommand:
    """Answered when the agent has leased the devices; how the start goes on is in its reports.

    Repeating it is no error. With a more urgent `priority` it raises that of the start under way: a raise needs no
    command of its own, and an agent that does not know priorities takes it for a repetition.
    """

    epoch: int
    spec: ReplicaSpec
    priority: Priority = Priority.REQUEST


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplicaCommand:
    """Requests still running get `drain_s` to finish, 0 stops at once. Stopping what is not there is no error."""

    epoch: int
    replica: ReplicaId
    generation: int
    drain_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchCommand:
    """Read into memory what a replica like `spec`, which has no id, would read. What is there of the digests in
    `instead_of` goes first, unless a replica needs it. Answered at once: reports show what came of it."""

    epoch: int
    spec: ReplicaSpec
    instead_of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateCommand:
    """Answered by reports until each of the order's requests has moved or stays."""

    epoch: int
    order: MigrationOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class GetExecutionFilesRequest:
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReadLogsRequest:
    """An empty `replica` means the agent's own log."""

    replica: str
    lines: int


class AgentService(Protocol):
    """Commands of a lower epoch than one already seen raise StaleGeneration."""

    def add_checkpoint(self, request: AddCheckpointCommand) -> AsyncIterator[AddProgress]: ...
    async def remove_checkpoint(self, request: RemoveCheckpointCommand) -> Empty: ...
    def verify_checkpoint(self, request: VerifyCheckpointCommand) -> AsyncIterator[AddProgress]:
        """Raises the InvalidCheckpoint that says what is wrong with the copy."""
        ...

    async def start_replica(self, request: StartReplicaCommand) -> Empty: ...
    async def stop_replica(self, request: StopReplicaCommand) -> Empty: ...
    async def prefetch(self, request: PrefetchCommand) -> Empty:
        """Raises NotFound, InvalidCheckpoint, InvalidArgument."""
        ...

    def migrate(self, request: MigrateCommand) -> AsyncIterator[MigrationReport]:
        """Ending the iteration cancels what has not been handed over."""
        ...

    def get_execution_files(self, request: GetExecutionFilesRequest) -> AsyncIterator[ExecutionFile]:
        """May yield a file in pieces, one after the other, each with its path."""
        ...

    def read_logs(self, request: AgentReadLogsRequest) -> AsyncIterator[LogChunk]: ...


NAME = "sllm.rpc.AgentService"
_c, _m = common_pb2, agent_pb2
ADD_CHECKPOINT = Method(
    "AddCheckpoint", AddCheckpointCommand, _m.AgentAddCheckpointRequest, AddProgress, _m.AddProgress, "stream"
)
REMOVE_CHECKPOINT = Method(
    "RemoveCheckpoint", RemoveCheckpointCommand, _m.AgentRemoveCheckpointRequest, Empty, _c.Empty
)
VERIFY_CHECKPOINT = Method(
    "VerifyCheckpoint", VerifyCheckpointCommand, _m.AgentVerifyCheckpointRequest, AddProgress, _m.AddProgress, "stream"
)
START_REPLICA = Method("StartReplica", StartReplicaCommand, _m.StartReplicaRequest, Empty, _c.Empty)
STOP_REPLICA = Method("StopReplica", StopReplicaCommand, _m.StopReplicaRequest, Empty, _c.Empty)
PREFETCH = Method("Prefetch", PrefetchCommand, _m.PrefetchRequest, Empty, _c.Empty)
MIGRATE = Method("Migrate", MigrateCommand, _m.MigrateCommand, MigrationReport, _c.MigrationReport, "stream")
GET_EXECUTION_FILES = Method(
    "GetExecutionFiles",
    GetExecutionFilesRequest,
    _m.GetExecutionFilesRequest,
    ExecutionFile,
    _c.ExecutionFile,
    "stream",
)
READ_LOGS = Method("ReadLogs", AgentReadLogsRequest, _m.AgentReadLogsRequest, LogChunk, _c.LogChunk, "stream")
METHODS = (
    ADD_CHECKPOINT,
    REMOVE_CHECKPOINT,
    VERIFY_CHECKPOINT,
    START_REPLICA,
    STOP_REPLICA,
    PREFETCH,
    MIGRATE,
    GET_EXECUTION_FILES,
    READ_LOGS,
)


def handlers(implementation: AgentService) -> Handlers:
    """Return the service for `transport.serve`."""
    return Handlers(NAME, METHODS, implementation)


async def joined(pieces: AsyncIterator[ExecutionFile]) -> AsyncIterator[ExecutionFile]:
    """Join the pieces of each file."""
    path, content = "", bytearray()
    async for piece in pieces:
        if path and piece.path != path:
            yield ExecutionFile(path=path, content=bytes(content))
            content.clear()
        path = piece.path
        content += piece.content
    if path:
        yield ExecutionFile(path=path, content=bytes(content))


class AgentClient(Client):
    """Client of AgentService."""

    service = NAME

    async def add_checkpoint(self, request: AddCheckpointCommand) -> AsyncIterator[AddProgress]:
        async with aclosing(self._stream(ADD_CHECKPOINT, request)) as stream:
            async for progress in stream:
                yield progress

    async def remove_checkpoint(self, request: RemoveCheckpointCommand) -> Empty:
        return await self._unary(REMOVE_CHECKPOINT, request)

    async def verify_checkpoint(self, request: VerifyCheckpointCommand) -> AsyncIterator[AddProgress]:
        async with aclosing(self._stream(VERIFY_CHECKPOINT, request)) as stream:
            async for progress in stream:
                yield progress

    async def start_replica(self, request: StartReplicaCommand) -> Empty:
        return await self._unary(START_REPLICA, request)

    async def stop_replica(self, request: StopReplicaCommand) -> Empty:
        return await self._unary(STOP_REPLICA, request)

    async def prefetch(self, request: PrefetchCommand) -> Empty:
        return await self._unary(PREFETCH, request)

    async def migrate(self, request: MigrateCommand) -> AsyncIterator[MigrationReport]:
        async with aclosing(self._stream(MIGRATE, request)) as stream:
            async for report in stream:
                yield report

    async def get_execution_files(self, request: GetExecutionFilesRequest) -> AsyncIterator[ExecutionFile]:
        """Yield each file whole: on the wire a large one comes in pieces, messages in a row with the same path."""
        async for file in joined(self._execution_pieces(request)):
            yield file

    async def _execution_pieces(self, request: GetExecutionFilesRequest) -> AsyncIterator[ExecutionFile]:
        async with aclosing(self._stream(GET_EXECUTION_FILES, request, timeout_s=60.0)) as stream:
            async for file in stream:
                yield file

    async def read_logs(self, request: AgentReadLogsRequest) -> AsyncIterator[LogChunk]:
        async with aclosing(self._stream(READ_LOGS, request)) as stream:
            async for chunk in stream:
                yield chunk
