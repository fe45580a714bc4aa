"""AgentService: the controller's commands, fenced by its epoch; execution files; logs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

from sllm.agent.checkpoints import Checkpoints
from sllm.agent.logs import tail_lines
from sllm.agent.replicas import Replicas
from sllm.agent.verifying import verify
from sllm.agent.weights import Weights
from sllm.core.checkpoint import ExecutionFile
from sllm.core.migration import MigrationReport
from sllm.errors import InvalidArgument, NotFound, StaleGeneration
from sllm.loader.store import SsdStore
from sllm.log import LogTail
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
from sllm.rpc.control import Empty, LogChunk

PIECE_BYTES = 4 << 20  # of an execution file in one message
_CHUNK_CHARS = 64 << 10
_MAX_LOG_LINES = 100_000
_REPLICA_ID = re.compile(r"rep-[A-Za-z0-9_-]+")


class Agent:
    """Implements `sllm.rpc.agents.AgentService`."""

    def __init__(
        self,
        *,
        checkpoints: Checkpoints,
        replicas: Replicas,
        store: SsdStore,
        weights: Weights,
        tail: LogTail,
        log_folder: Path,
    ) -> None:
        self._checkpoints = checkpoints
        self._replicas = replicas
        self._store = store
        self._weights = weights
        self._tail = tail
        self._log_folder = log_folder
        self._epoch = 0

    def learn_epoch(self, epoch: int) -> None:
        """Commands of leaders before this one are refused from now on."""
        self._epoch = max(self._epoch, epoch)

    async def add_checkpoint(self, request: AddCheckpointCommand) -> AsyncIterator[AddProgress]:
        self._admit(request.epoch)
        async for progress in self._checkpoints.add(request.name, request.source):
            yield progress

    async def remove_checkpoint(self, request: RemoveCheckpointCommand) -> Empty:
        self._admit(request.epoch)
        await self._checkpoints.remove(request.name)
        return Empty()

    async def verify_checkpoint(self, request: VerifyCheckpointCommand) -> AsyncIterator[AddProgress]:
        self._admit(request.epoch)
        async with aclosing(verify(self._store, self._weights, request.name, deep=request.deep)) as verification:
            async for progress in verification:
                yield progress

    async def start_replica(self, request: StartReplicaCommand) -> Empty:
        self._admit(request.epoch)
        if not _REPLICA_ID.fullmatch(request.spec.id) or not request.spec.devices:
            raise InvalidArgument(f"{request.spec.id!r} is no replica id, or the replica has no device")
        self._replicas.start(request.spec, request.priority)
        return Empty()

    async def stop_replica(self, request: StopReplicaCommand) -> Empty:
        self._admit(request.epoch)
        self._replicas.stop(request.replica, request.generation, request.drain_s)
        return Empty()

    async def prefetch(self, request: PrefetchCommand) -> Empty:
        self._admit(request.epoch)
        await self._replicas.prefetch(request.spec, request.instead_of)
        return Empty()

    async def migrate(self, request: MigrateCommand) -> AsyncIterator[MigrationReport]:
        """Have a replica's engine host carry out an order, and pass on what it reports, its errors included."""
        self._admit(request.epoch)
        host = self._replicas.host(request.order.replica, request.order.generation)
        async with aclosing(host.client.migrate(request.order)) as reports:
            async for report in reports:
                yield report

    async def get_execution_files(self, request: GetExecutionFilesRequest) -> AsyncIterator[ExecutionFile]:
        pieces = self._store.execution_files(request.digest, piece_bytes=PIECE_BYTES)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield ExecutionFile(path=piece[0], content=piece[1])

    async def read_logs(self, request: AgentReadLogsRequest) -> AsyncIterator[LogChunk]:
        for text in _chunks(await self._lines(request)):
            yield LogChunk(text=text)

    async def _lines(self, request: AgentReadLogsRequest) -> list[str]:
        lines = max(0, min(request.lines, _MAX_LOG_LINES))
        if not request.replica:
            return [f"{line}\n" for line in self._tail.tail(lines)]
        path = self._log_folder / f"{request.replica}.log"
        if not _REPLICA_ID.fullmatch(request.replica) or not path.exists():
            raise NotFound(f"there is no log of replica {request.replica!r} on this node")
        return await asyncio.to_thread(tail_lines, path, lines)

    def _admit(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise StaleGeneration(f"a command of epoch {epoch} was refused: epoch {self._epoch} rules now")
        self._epoch = epoch


def _chunks(lines: list[str]) -> Iterator[str]:
    kept = ""
    for line in lines:
        kept += line
        if len(kept) >= _CHUNK_CHARS:
            yield kept
            kept = ""
    if kept:
        yield kept
