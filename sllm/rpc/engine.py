"""EngineService: the engine host's wire, with the token protocol's frames converted by hand (they are hot: one frame
per engine step for all requests of a gateway; cost is per message, so columns are packed)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from sllm.core.ids import ReplicaId, RequestId
from sllm.core.replica import ReplicaState, StartPhase
from sllm.core.tokens import (
    AbortRequests,
    ClientFrame,
    Finish,
    FinishReason,
    Logprobs,
    OpenStream,
    Prefill,
    StepOutputs,
    TokenOutput,
    TokenRequest,
)
from sllm.errors import InvalidArgument, Unavailable
from sllm.rpc import common_pb2, engine_pb2
from sllm.rpc.control import Empty
from sllm.rpc.errors import detail_of, error_of, from_rpc_error
from sllm.rpc.transport import Client, Handlers, Method, abort


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """`nonce` was drawn by whoever started this host; it proves that host and caller mean the same replica."""

    nonce: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatus:
    """The engine host's own account of its replica; the agent copies it into its report."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    drain_s: float = 0.0


class EngineService(Protocol):
    """`attach` yields the status now and at every change; `stream` speaks the token protocol."""

    def attach(self, request: AttachRequest) -> AsyncIterator[HostStatus]: ...
    async def stop(self, request: StopRequest) -> Empty: ...
    def stream(self, frames: AsyncIterator[ClientFrame]) -> AsyncIterator[StepOutputs]: ...


NAME = "sllm.rpc.EngineService"
ATTACH = Method("Attach", AttachRequest, engine_pb2.AttachRequest, HostStatus, engine_pb2.HostStatus, "stream")
STOP = Method("Stop", StopRequest, engine_pb2.StopRequest, Empty, common_pb2.Empty)
STREAM = "Stream"


# --- frames --------------------------------------------------------------------------------


def pack_client_frame(frame: ClientFrame) -> bytes:
    """Serialise a frame from gateway to engine host."""
    match frame:
        case OpenStream():
            message = engine_pb2.ClientFrame(
                open=engine_pb2.OpenStream(
                    protocol_version=frame.protocol_version,
                    gateway=frame.gateway,
                    generation=frame.generation,
                )
            )
        case TokenRequest():
            message = engine_pb2.ClientFrame(add=_pack_request(frame))
        case AbortRequests():
            message = engine_pb2.ClientFrame(abort=engine_pb2.AbortRequests(stream_ids=frame.stream_ids))
    return message.SerializeToString()


def _pack_request(request: TokenRequest) -> engine_pb2.AddRequest:
    message = engine_pb2.AddRequest(
        stream_id=request.stream_id,
        request_id=request.request_id,
        token_ids=request.token_ids,
        num_output_tokens=request.num_output_tokens,
        sampling_params=request.sampling_params,
        cache_salt=request.cache_salt,
        priority=request.priority,
        arrival_time=request.arrival_time,
    )
    if request.reasoning_ended is not None:
        message.reasoning_ended = request.reasoning_ended
    return message


def parse_client_frame(data: bytes) -> ClientFrame:
    """Parse a frame from a gateway. Raises InvalidArgument for a frame this version does not know."""
    message = engine_pb2.ClientFrame.FromString(data)
    match message.WhichOneof("frame"):
        case "open":
            opened = message.open
            return OpenStream(
                protocol_version=opened.protocol_version,
                gateway=opened.gateway,
                generation=opened.generation,
            )
        case "add":
            return _parse_request(message.add)
        case "abort":
            return AbortRequests(stream_ids=list(message.abort.stream_ids))
    raise InvalidArgument("a gateway sent a frame that this version does not know")


def _parse_request(add: engine_pb2.AddRequest) -> TokenRequest:
    return TokenRequest(
        stream_id=add.stream_id,
        request_id=RequestId(add.request_id),
        token_ids=list(add.token_ids),
        num_output_tokens=add.num_output_tokens,
        sampling_params=add.sampling_params,
        cache_salt=add.cache_salt,
        priority=add.priority,
        arrival_time=add.arrival_time,
        reasoning_ended=add.reasoning_ended if add.HasField("reasoning_ended") else None,
    )


def pack_step(step: StepOutputs) -> bytes:
    """Serialise one engine step for one gateway."""
    frame = engine_pb2.EngineFrame(
        stream_ids=[o.stream_id for o in step.outputs],
        token_counts=[len(o.token_ids) for o in step.outputs],
        positions=[o.position for o in step.outputs],
        token_ids=[token for o in step.outputs for token in o.token_ids],
        timestamp=step.timestamp,
    )
    for output in step.outputs:
        if output.finish or output.logprobs or output.prompt_logprobs or output.prefill:
            _pack_extras(frame, output)
    return frame.SerializeToString()


def _pack_extras(frame: engine_pb2.EngineFrame, output: TokenOutput) -> None:
    stream_id = output.stream_id
    if output.finish is not None:
        frame.finishes.append(_pack_finish(stream_id, output.finish))
    if output.logprobs is not None:
        frame.logprobs.append(_pack_logprobs(stream_id, output.logprobs))
    if output.prompt_logprobs is not None:
        frame.prompt_logprobs.append(_pack_logprobs(stream_id, output.prompt_logprobs))
    if output.prefill is not None:
        frame.prefills.add(
            stream_id=stream_id,
            num_prompt_tokens=output.prefill.num_prompt_tokens,
            num_cached_tokens=output.prefill.num_cached_tokens,
        )


def _pack_finish(stream_id: int, finish: Finish) -> engine_pb2.Finish:
    return engine_pb2.Finish(
        stream_id=stream_id,
        reason=engine_pb2.FinishReason.Name(finish.reason.value),
        stop_token_id=finish.stop_token_id,
        stop_string=finish.stop_string,
        error=None if finish.error is None else detail_of(finish.error),
    )


def _pack_logprobs(stream_id: int, logprobs: Logprobs) -> engine_pb2.Logprobs:
    return engine_pb2.Logprobs(
        stream_id=stream_id,
        num_rows=logprobs.num_rows,
        width=logprobs.width,
        token_ids=logprobs.token_ids,
        values=logprobs.values,
        ranks=logprobs.ranks,
    )


def parse_step(data: bytes) -> StepOutputs:
    """Parse one engine step. Raises InvalidArgument if its columns do not fit together."""
    frame = engine_pb2.EngineFrame.FromString(data)
    if not len(frame.stream_ids) == len(frame.token_counts) == len(frame.positions):
        raise InvalidArgument("an engine host sent a frame with columns of unequal length")
    if sum(frame.token_counts) != len(frame.token_ids):
        raise InvalidArgument("an engine host sent a frame whose token counts do not add up")
    finishes = {f.stream_id: _parse_finish(f) for f in frame.finishes}
    logprobs = {p.stream_id: _parse_logprobs(p) for p in frame.logprobs}
    prompt_logprobs = {p.stream_id: _parse_logprobs(p) for p in frame.prompt_logprobs}
    prefills = {p.stream_id: _parse_prefill(p) for p in frame.prefills}
    outputs, start, tokens = [], 0, list(frame.token_ids)
    for stream_id, count, position in zip(frame.stream_ids, frame.token_counts, frame.positions, strict=True):
        output = TokenOutput(
            stream_id=stream_id,
            position=position,
            token_ids=tokens[start : start + count],
            finish=finishes.get(stream_id),
            logprobs=logprobs.get(stream_id),
            prompt_logprobs=prompt_logprobs.get(stream_id),
            prefill=prefills.get(stream_id),
        )
        outputs.append(output)
        start += count
    return StepOutputs(outputs=outputs, timestamp=frame.timestamp)


def _parse_finish(finish: engine_pb2.Finish) -> Finish:
    known = {reason.value for reason in FinishReason}
    return Finish(
        # A reason of a newer peer is treated as an error: the client must not take it for a normal end.
        reason=FinishReason(finish.reason) if finish.reason in known else FinishReason.ERROR,
        stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
        stop_string=finish.stop_string if finish.HasField("stop_string") else None,
        error=error_of(finish.error) if finish.HasField("error") else None,
    )


def _parse_logprobs(logprobs: engine_pb2.Logprobs) -> Logprobs:
    cells = logprobs.num_rows * logprobs.width
    if not len(logprobs.token_ids) == len(logprobs.values) == cells or len(logprobs.ranks) != logprobs.num_rows:
        raise InvalidArgument("an engine host sent logprobs whose shape does not fit their content")
    return Logprobs(
        num_rows=logprobs.num_rows,
        width=logprobs.width,
        token_ids=list(logprobs.token_ids),
        values=list(logprobs.values),
        ranks=list(logprobs.ranks),
    )


def _parse_prefill(prefill: engine_pb2.Prefill) -> Prefill:
    return Prefill(num_prompt_tokens=prefill.num_prompt_tokens, num_cached_tokens=prefill.num_cached_tokens)


# --- server and client ---------------------------------------------------------------------


def handlers(implementation: EngineService) -> Handlers:
    """Return the service for `transport.serve`."""
    service = Handlers(NAME, (ATTACH, STOP), implementation)
    service.handlers[STREAM] = grpc.stream_stream_rpc_method_handler(
        _serve_stream(implementation.stream), parse_client_frame, pack_step
    )
    return service


def _serve_stream(
    function: Callable[[AsyncIterator[ClientFrame]], AsyncIterator[StepOutputs]],
) -> Callable[[AsyncIterator[ClientFrame], grpc.aio.ServicerContext], AsyncIterator[StepOutputs]]:
    async def call(frames: AsyncIterator[ClientFrame], context: grpc.aio.ServicerContext) -> AsyncIterator[StepOutputs]:
        try:
            async for step in function(frames):
                yield step
        except Exception as error:
            await abort(context, error, STREAM)

    return call


class TokenStream:
    """The client's end of one token stream. `send` never blocks the caller; iterating yields steps until it breaks."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, StepOutputs], peer: str) -> None:
        self._call = call
        self._peer = peer
        self._outbox: asyncio.Queue[ClientFrame] = asyncio.Queue()
        self._writer = asyncio.create_task(self._write())

    def send(self, frame: ClientFrame) -> None:
        self._outbox.put_nowait(frame)

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outbox.get())
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

    def open_stream(self, opening: OpenStream) -> TokenStream:
        """Open the token stream; `opening` is its first frame."""
        call = self._channel.stream_stream(
            f"/{NAME}/{STREAM}", request_serializer=pack_client_frame, response_deserializer=parse_step
        )()
        stream = TokenStream(call, self.peer)
        stream.send(opening)
        return stream
