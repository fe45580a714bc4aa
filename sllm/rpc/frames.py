"""The token protocol's frames, converted by hand, because they are hot.

One frame per engine step carries all requests of a gateway, in packed columns: cost is per message, not per token.
"""

from __future__ import annotations

from sllm.core.ids import RequestId
from sllm.core.route import RouteTarget
from sllm.core.tokens import (
    AbortRequests,
    ClientFrame,
    Finish,
    FinishReason,
    Logprobs,
    Moved,
    OpenStream,
    Prefill,
    StepOutputs,
    TokenOutput,
    TokenRequest,
)
from sllm.errors import InvalidArgument
from sllm.rpc import common_pb2, engine_pb2
from sllm.rpc.convert import from_proto, to_proto
from sllm.rpc.errors import detail_of, error_of


def pack_client_frame(frame: ClientFrame) -> bytes:
    """Serialise a frame from gateway to engine host. Raises InvalidArgument for what no frame can hold."""
    try:
        return _client_message(frame).SerializeToString()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"the request cannot be sent: {error}") from error


def _client_message(frame: ClientFrame) -> engine_pb2.ClientFrame:
    match frame:
        case OpenStream():
            return engine_pb2.ClientFrame(
                open=engine_pb2.OpenStream(
                    protocol_version=frame.protocol_version,
                    gateway=frame.gateway,
                    generation=frame.generation,
                )
            )
        case TokenRequest():
            return engine_pb2.ClientFrame(add=_pack_request(frame))
        case AbortRequests():
            return engine_pb2.ClientFrame(abort=engine_pb2.AbortRequests(stream_ids=frame.stream_ids))


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
        steps=step.steps,
    )
    for moved in step.moves:
        _pack_moved(frame, moved)
    for output in step.outputs:
        if output.finish or output.logprobs or output.prompt_logprobs or output.prefill:
            _pack_extras(frame, output)
    return frame.SerializeToString()


def _pack_moved(frame: engine_pb2.EngineFrame, moved: Moved) -> None:
    target = to_proto(moved.target, common_pb2.RouteTarget)
    frame.moves.add(stream_id=moved.stream_id, position=moved.position, target=target)


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
    return StepOutputs(
        outputs=outputs,
        timestamp=frame.timestamp,
        moves=[_parse_moved(moved) for moved in frame.moves],
        steps=frame.steps,
    )


def _parse_moved(moved: engine_pb2.Moved) -> Moved:
    target = from_proto(moved.target, RouteTarget)
    return Moved(stream_id=moved.stream_id, position=moved.position, target=target)


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
