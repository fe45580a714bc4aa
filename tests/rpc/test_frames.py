"""Token frames: what goes in comes out; what does not fit together is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.core.ids import NodeName, ReplicaId, RequestId
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
from sllm.errors import EngineFailed, InvalidArgument
from sllm.rpc import engine_pb2
from sllm.rpc.frames import pack_client_frame, pack_step, parse_client_frame, parse_step

U32 = st.integers(0, 2**32 - 1)
TOKENS = st.lists(U32, max_size=5)


@st.composite
def logprobs(draw: st.DrawFn) -> Logprobs:
    rows, width = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    cells = rows * width
    return Logprobs(
        num_rows=rows,
        width=width,
        token_ids=draw(st.lists(U32, min_size=cells, max_size=cells)),
        values=draw(st.lists(st.floats(width=32, allow_nan=False), min_size=cells, max_size=cells)),
        ranks=draw(st.lists(U32, min_size=rows, max_size=rows)),
    )


FINISHES = st.builds(
    Finish,
    reason=st.sampled_from([r for r in FinishReason if r is not FinishReason.ERROR]),
    stop_token_id=st.none() | st.integers(0, 2**40),
    stop_string=st.none() | st.text(max_size=5),
)


TARGETS = st.builds(
    RouteTarget,
    replica=st.just(ReplicaId("rep-1")),
    node=st.just(NodeName("node-1")),
    address=st.text(max_size=5),
    generation=U32,
    revision=U32,
    capacity=U32,
)


@st.composite
def steps(draw: st.DrawFn) -> StepOutputs:
    ids = draw(st.lists(U32, unique=True, max_size=4))
    outputs = [
        TokenOutput(
            stream_id=stream_id,
            position=draw(U32),
            token_ids=draw(TOKENS),
            finish=draw(st.none() | FINISHES),
            logprobs=draw(st.none() | logprobs()),
            prompt_logprobs=draw(st.none() | logprobs()),
            prefill=draw(st.none() | st.builds(Prefill, num_prompt_tokens=U32, num_cached_tokens=U32)),
        )
        for stream_id in ids
    ]
    moves = draw(st.lists(st.builds(Moved, stream_id=U32, position=U32, target=TARGETS), max_size=2))
    return StepOutputs(outputs=outputs, timestamp=draw(st.floats(0, 1e12)), moves=moves, steps=draw(U32))


@given(steps())
def test_a_step_survives_the_wire(step: StepOutputs) -> None:
    assert parse_step(pack_step(step)) == step


CLIENT_FRAMES = st.one_of(
    st.builds(OpenStream, protocol_version=U32, gateway=st.text(max_size=5), generation=st.integers(0, 2**40)),
    st.builds(
        TokenRequest,
        stream_id=U32,
        request_id=st.text(max_size=5).map(RequestId),
        token_ids=TOKENS,
        sampling_params=st.binary(max_size=10),
        num_output_tokens=U32,
        cache_salt=st.text(max_size=5),
        priority=st.integers(-5, 5),
        arrival_time=st.floats(0, 1e12),
        reasoning_ended=st.none() | st.booleans(),
    ),
    st.builds(AbortRequests, stream_ids=TOKENS),
)


@given(CLIENT_FRAMES)
def test_a_client_frame_survives_the_wire(frame: ClientFrame) -> None:
    assert parse_client_frame(pack_client_frame(frame)) == frame


def test_an_error_in_a_finish_keeps_its_class_and_text() -> None:
    finish = Finish(reason=FinishReason.ERROR, error=EngineFailed("signal 9", hint="look"))
    step = StepOutputs(outputs=[TokenOutput(stream_id=1, position=0, token_ids=[], finish=finish)])
    again = parse_step(pack_step(step)).outputs[0].finish
    assert again is not None
    assert isinstance(again.error, EngineFailed)
    assert again.error.hint == "look"


def test_what_no_frame_can_hold_is_refused_before_it_is_sent() -> None:
    request = TokenRequest(stream_id=1, request_id=RequestId("req-1"), token_ids=[2**40], sampling_params=b"{}")
    with pytest.raises(InvalidArgument):
        pack_client_frame(request)


def test_an_unknown_frame_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        parse_client_frame(b"")


def test_a_finish_reason_of_a_newer_host_is_never_taken_for_a_normal_end() -> None:
    frame = engine_pb2.EngineFrame(stream_ids=[1], token_counts=[0], positions=[0])
    frame.finishes.add(stream_id=1, reason=99)  # type: ignore[arg-type]
    finish = parse_step(frame.SerializeToString()).outputs[0].finish
    assert finish is not None
    assert finish.reason is FinishReason.ERROR


@pytest.mark.parametrize(
    "frame",
    [
        engine_pb2.EngineFrame(stream_ids=[1, 2], token_counts=[0], positions=[0, 0]),
        engine_pb2.EngineFrame(stream_ids=[1], token_counts=[2], positions=[0], token_ids=[5]),
        engine_pb2.EngineFrame(
            stream_ids=[1],
            token_counts=[0],
            positions=[0],
            logprobs=[engine_pb2.Logprobs(stream_id=1, num_rows=2, width=2, token_ids=[1])],
        ),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(frame: engine_pb2.EngineFrame) -> None:
    with pytest.raises(InvalidArgument):
        parse_step(frame.SerializeToString())
