"""The table of open requests."""

from __future__ import annotations

import itertools

import pytest

from sllm.core.ids import NodeName, ReplicaId, RequestId
from sllm.core.route import RouteTarget
from sllm.core.tokens import Finish, FinishReason, StepOutputs, TokenRequest
from sllm.engine import connection as connections
from sllm.engine.base import Output
from sllm.engine.connection import Connection
from sllm.engine.requests import Requests
from sllm.errors import EngineFailed, SllmError, Unavailable

TARGET = RouteTarget(
    replica=ReplicaId("rep-2"), node=NodeName("b"), address="x:1", generation=1, revision=1, capacity=4
)


def ask(stream_id: int, *, had: int = 0, request: str = "req-1") -> TokenRequest:
    return TokenRequest(
        stream_id=stream_id,
        request_id=RequestId(request),
        token_ids=[5] * (had + 1),
        num_output_tokens=had,
        sampling_params=b"{}",
    )


def table(ended: list[RequestId] | None = None) -> Requests:
    keys = itertools.count(1)
    return Requests(lambda: next(keys), (ended if ended is not None else []).append)


async def drained(connection: Connection) -> list[StepOutputs]:
    connection.close()
    return [step async for step in connection.steps()]


async def test_one_engine_step_is_one_message_for_each_gateway() -> None:
    requests = table()
    one, two = requests.connect("one"), requests.connect("two")
    keys = [requests.open(one, ask(1)), requests.open(two, ask(1)), requests.open(one, ask(2))]
    requests.deliver([Output(key=key, token_ids=[key]) for key in keys], 1.5, 9)
    first, second = await drained(one), await drained(two)
    assert [[output.stream_id for output in step.outputs] for step in first] == [[1, 2]]
    assert [[output.stream_id for output in step.outputs] for step in second] == [[1]]
    assert first[0].timestamp == 1.5


async def test_positions_count_every_token_of_a_step() -> None:
    requests = table()
    connection = requests.connect("one")
    key = requests.open(connection, ask(1, had=4))
    for token_ids in ([1, 2], [], [3]):
        requests.deliver([Output(key=key, token_ids=token_ids)], 0.0, 9)
    assert [step.outputs[0].position for step in await drained(connection)] == [4, 6, 6]


async def test_output_for_a_request_that_is_gone_is_dropped() -> None:
    requests = table()
    connection = requests.connect("one")
    key = requests.open(connection, ask(1))
    assert requests.drop(connection, [1, 2]) == [key]
    requests.deliver([Output(key=key, token_ids=[1])], 0.0, 9)
    assert await drained(connection) == []
    assert len(requests) == 0


async def test_a_stream_id_may_be_used_again_with_another_key() -> None:
    requests = table()
    connection = requests.connect("one")
    first = requests.open(connection, ask(1))
    requests.drop(connection, [1])
    assert requests.open(connection, ask(1)) != first


async def test_a_gateway_that_does_not_read_loses_its_connection_and_its_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "MAX_UNREAD_STEPS", 2)
    requests = table()
    slow, other = requests.connect("slow"), requests.connect("other")
    key, kept = requests.open(slow, ask(1)), requests.open(other, ask(1))
    step = [Output(key=key, token_ids=[1])]
    assert [requests.deliver(step, 0.0, 9) for _ in range(3)] == [[], [], [key]]
    assert requests.deliver([Output(key=kept, token_ids=[1])], 0.0, 9) == []
    with pytest.raises(Unavailable, match="behind"):
        [_ async for _ in slow.steps()]


async def test_failing_all_ends_each_request_with_the_error() -> None:
    requests = table()
    connection = requests.connect("one")
    keys = [requests.open(connection, ask(stream_id)) for stream_id in (1, 2)]
    assert requests.fail_all(EngineFailed("gone"), 0.0, 9) == keys
    (step,) = await drained(connection)
    assert [str(output.finish.error) for output in step.outputs if output.finish] == ["gone", "gone"]
    assert len(requests) == 0


async def test_an_error_at_closing_comes_after_what_was_sent() -> None:
    connection = table().connect("one")
    connection.send(StepOutputs())
    connection.close(SllmError("late"))
    connection.close()
    steps = connection.steps()
    assert await anext(steps) == StepOutputs()
    with pytest.raises(SllmError, match="late"):
        await anext(steps)


async def test_large_outputs_of_one_step_do_not_share_a_message() -> None:
    requests = table()
    one = requests.connect("one")
    keys = [requests.open(one, ask(stream_id)) for stream_id in (1, 2, 3)]
    large = [Output(key=key, token_ids=[7], prompt_logprobs=b"large") for key in keys[:2]]
    requests.deliver([*large, Output(key=keys[2], token_ids=[7])], 1.5, 9)
    assert [[output.stream_id for output in step.outputs] for step in await drained(one)] == [[1], [2], [3]]


async def test_a_handover_tells_each_sequence_behind_all_it_was_sent_and_forgets_them() -> None:
    ended: list[RequestId] = []
    requests = table(ended)
    one = requests.connect("one")
    keys = [requests.open(one, ask(1)), requests.open(one, ask(2, had=3))]
    requests.deliver([Output(key=key, token_ids=[7]) for key in keys], 0.0, 9)
    assert requests.hand_over(RequestId("req-1"), TARGET, 1.0, 10) == keys
    requests.deliver([Output(key=keys[0], token_ids=[8])], 2.0, 11)  # of a step that was under way
    step, handover = await drained(one)
    assert len(step.outputs) == 2
    assert [(moved.stream_id, moved.position, moved.target) for moved in handover.moves] == [
        (1, 1, TARGET),
        (2, 4, TARGET),
    ]
    assert (handover.outputs, handover.steps) == ([], 10)
    assert (len(requests), one.keys, ended) == (0, {}, ["req-1"])


def test_a_request_has_ended_with_its_last_sequence() -> None:
    ended: list[RequestId] = []
    requests = table(ended)
    one = requests.connect("one")
    keys = [requests.open(one, ask(stream_id)) for stream_id in (1, 2)]
    finish = Finish(reason=FinishReason.LENGTH)
    requests.deliver([Output(key=keys[0], token_ids=[7], finish=finish)], 0.0, 9)
    assert ended == []
    assert requests.disconnect(one) == keys[1:]
    assert ended == ["req-1"]


class Mover:
    """Hands `waiting` over when another request has ended, as an order does in which it is the next."""

    def __init__(self, waiting: str) -> None:
        keys = itertools.count(1)
        self.requests = Requests(lambda: next(keys), self._ended)
        self.moved: list[int] = []
        self._waiting = RequestId(waiting)

    def _ended(self, request: RequestId) -> None:
        if request != self._waiting:
            self.moved += self.requests.hand_over(self._waiting, TARGET, 1.0, 10)


async def test_a_handover_that_the_end_of_another_brings_about_comes_behind_the_tokens_of_that_step() -> None:
    mover = Mover("req-2")
    one = mover.requests.connect("one")
    waits = mover.requests.open(one, ask(1, request="req-2"))
    ends = mover.requests.open(one, ask(2, request="req-1"))
    last = Output(key=ends, token_ids=[8], finish=Finish(reason=FinishReason.LENGTH))
    mover.requests.deliver([Output(key=waits, token_ids=[7]), last], 0.0, 9)
    assert mover.moved == [waits]
    step, handover = await drained(one)
    assert [output.stream_id for output in step.outputs] == [1, 2]
    assert [(moved.stream_id, moved.position) for moved in handover.moves] == [(1, 1)]


def test_what_goes_with_its_gateway_is_not_handed_over_meanwhile() -> None:
    mover = Mover("req-2")
    one = mover.requests.connect("one")
    keys = [mover.requests.open(one, ask(1, request="req-1")), mover.requests.open(one, ask(2, request="req-2"))]
    assert mover.requests.disconnect(one) == keys
    assert mover.moved == []
    assert len(mover.requests) == 0


def test_a_sequence_knows_its_tokens_and_its_interval() -> None:
    requests = table()
    key = requests.open(requests.connect("one"), ask(1, had=2))
    (sequence,) = requests.sequences(RequestId("req-1"))
    seen = []
    for now, token_ids in ((5.0, [1]), (5.5, [2]), (5.9, []), (7.5, [3, 4])):
        requests.deliver([Output(key=key, token_ids=token_ids)], now, 9)
        seen.append(sequence.pace.interval_s)
    assert seen[:3] == [None, 0.5, 0.5]
    assert seen[3] == pytest.approx(0.5 + 0.2 * (1.0 - 0.5)), "the latest counts a fifth"
    assert (list(sequence.token_ids), sequence.position) == ([5, 5, 5, 1, 2, 3, 4], 6)


async def test_a_sign_of_life_comes_only_where_requests_are_and_nothing_else_was_sent() -> None:
    requests = table()
    busy, quiet, idle = (requests.connect(name) for name in ("busy", "quiet", "idle"))
    key, _ = requests.open(busy, ask(1)), requests.open(quiet, ask(1))
    requests.deliver([Output(key=key, token_ids=[7])], 0.0, 9)
    for steps in (9, 10):
        requests.beat(1.0, steps)  # the second finds the first unread
    counts = [[(len(step.outputs), step.steps) for step in await drained(each)] for each in (busy, quiet, idle)]
    assert counts == [[(1, 9)], [(0, 9)], []]
