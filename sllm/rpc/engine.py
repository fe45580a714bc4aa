"""EngineService: how an agent holds its engine host, and the token stream between gateway and engine host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from sllm.core.ids import ReplicaId, RequestId
from sllm.core.migration import MigrationOrder, MigrationReport, Round
from sllm.core.replica import ReplicaState, StartPhase
from sllm.core.tokens import ClientFrame, OpenStream, StepOutputs
from sllm.errors import Unavailable
from sllm.rpc import common_pb2, engine_pb2
from sllm.rpc.control import Empty
from sllm.rpc.errors import from_rpc_error
from sllm.rpc.frames import pack_client_frame, pack_step, parse_client_frame, parse_step
from sllm.rpc.transport import Client, Handlers, Method, abort


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """`nonce` was drawn by whoever started this host; it proves that host and caller mean the same replica."""

    nonce: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatus:
    """The engine host's own account of its replica; the agent copies it into its report. `runtime_saved`: it has
    written its parameters to where its launch said."""

    replica: ReplicaId
    state: ReplicaState
    phase: StartPhase
    progress: float = 0.0
    error: str = ""
    error_reason: str = ""
    phases_s: dict[str, float] = field(default_factory=dict)
    running: int = 0
    waiting: int = 0
    memory_bytes: int = 0
    runtime_saved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    drain_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeRequest:
    """One round of a migration: `token_ids` are prompt and output so far, of a request that may come here."""

    request_id: RequestId
    generation: int
    token_ids: tuple[int, ...]
    cache_salt: str = ""


class EngineService(Protocol):
    """`attach` yields the status now and at every change; `stream` speaks the token protocol.

    `migrate` (at the source) reports until each request has moved or stays; ending it cancels the rest. `recompute`
    (at the destination) returns when the tokens' KV cache has been computed.
    """

    def attach(self, request: AttachRequest) -> AsyncIterator[HostStatus]: ...
    async def stop(self, request: StopRequest) -> Empty: ...
    def stream(self, frames: AsyncIterator[ClientFrame]) -> AsyncIterator[StepOutputs]: ...
    def migrate(self, request: MigrationOrder) -> AsyncIterator[MigrationReport]: ...
    async def recompute(self, request: RecomputeRequest) -> Round: ...


NAME = "sllm.rpc.EngineService"
ATTACH = Method("Attach", AttachRequest, engine_pb2.AttachRequest, HostStatus, engine_pb2.HostStatus, "stream")
STOP = Method("Stop", StopRequest, engine_pb2.StopRequest, Empty, common_pb2.Empty)
MIGRATE = Method(
    "Migrate",
    MigrationOrder,
    common_pb2.MigrationOrder,
    MigrationReport,
    common_pb2.MigrationReport,
    "stream",
)
RECOMPUTE = Method("Recompute", RecomputeRequest, engine_pb2.RecomputeRequest, Round, common_pb2.Round)
STREAM = "Stream"


def handlers(implementation: EngineService) -> Handlers:
    """Return the service for `transport.serve`."""
    service = Handlers(NAME, (ATTACH, STOP, MIGRATE, RECOMPUTE), implementation)
    service.handlers[STREAM] = grpc.stream_stream_rpc_method_handler(
        _serve_stream(implementation.stream), parse_client_frame
    )
    return service


def _serve_stream(
    function: Callable[[AsyncIterator[ClientFrame]], AsyncIterator[StepOutputs]],
) -> Callable[[AsyncIterator[ClientFrame], grpc.aio.ServicerContext], AsyncIterator[bytes]]:
    async def call(frames: AsyncIterator[ClientFrame], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        try:
            async for step in function(frames):
                yield pack_step(step)
        except Exception as error:
            await abort(context, error, STREAM)

    return call


class TokenStream:
    """The client's end of one token stream. `send` never blocks; iterating `steps` yields them until it breaks.

    `reached` is set once the host is connected: what was sent before a break then may have come to it.
    """

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, StepOutputs], peer: str) -> None:
        self.reached = False
        self._call = call
        self._peer = peer
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._writer = asyncio.create_task(self._write())

    def send(self, frame: ClientFrame) -> None:
        """Raises InvalidArgument for a frame that cannot be packed; the stream and its other requests go on."""
        self._outbox.put_nowait(pack_client_frame(frame))

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outbox.get())
                self.reached = True
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader sees why

    async def steps(self) -> AsyncIterator[StepOutputs]:
        """Yield steps. The stream ends only by failing: raises Unavailable, or the host's own error."""
        try:
            async for step in self._call:
                yield step
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._peer) from error
        raise Unavailable(f"{self._peer} closed the token stream")

    async def close(self) -> None:
        self._writer.cancel()
        self._call.cancel()


class EngineClient(Client):
    """Client of EngineService."""

    service = NAME

    async def attach(self, request: AttachRequest) -> AsyncGenerator[HostStatus, None]:
        async with aclosing(self._stream(ATTACH, request)) as stream:
            async for status in stream:
                yield status

    async def stop(self, request: StopRequest) -> Empty:
        return await self._unary(STOP, request)

    async def migrate(self, request: MigrationOrder) -> AsyncGenerator[MigrationReport, None]:
        async with aclosing(self._stream(MIGRATE, request)) as stream:
            async for report in stream:
                yield report

    async def recompute(self, request: RecomputeRequest, *, timeout_s: float) -> Round:
        return await self._unary(RECOMPUTE, request, timeout_s=timeout_s)

    def open_stream(self, opening: OpenStream) -> TokenStream:
        """Open the token stream; `opening` is its first frame."""
        call = self._channel.stream_stream(f"/{NAME}/{STREAM}", response_deserializer=parse_step)()
        stream = TokenStream(call, self.peer)
        stream.send(opening)
        return stream
