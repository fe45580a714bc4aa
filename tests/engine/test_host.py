"""The engine host over real gRPC, with the fake engine: its agent's side and its gateways' side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from sllm.core.replica import ReplicaState, StartPhase
from sllm.core.tokens import AbortRequests, FinishReason
from sllm.engine.fake import FakeSettings
from sllm.errors import EngineFailed, InvalidArgument, StaleGeneration, Unavailable
from sllm.rpc.engine import AttachRequest, StopRequest

Serve = Callable[..., Any]
Make = Callable[..., Any]


def tokens(outputs: list[Any]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


# --- the agent -----------------------------------------------------------------------------


async def test_it_tells_how_its_build_goes_and_that_it_is_ready(serve: Serve) -> None:
    served = await serve(gated=True)
    seen = []
    async with aclosing(served.client.attach(AttachRequest(nonce=served.launch.nonce))) as statuses:
        async for status in statuses:
            seen.append(status)
            served.clock.let(1)
            if status.state is ReplicaState.READY:
                break
    assert [status.state for status in seen[:-1]] == [ReplicaState.STARTING] * (len(seen) - 1)
    assert [status.progress for status in seen] == sorted(status.progress for status in seen)
    assert seen[0].phase is StartPhase.BUILDING
    assert seen[-1].phase is StartPhase.READY
    assert seen[-1].phases_s["building"] >= 0


async def test_a_wrong_nonce_is_refused(serve: Serve) -> None:
    served = await serve()
    with pytest.raises(StaleGeneration, match="another nonce"):
        await anext(served.client.attach(AttachRequest(nonce="guess")))


async def test_a_second_agent_may_attach(serve: Serve) -> None:
    served = await serve()
    first, second = (served.client.attach(AttachRequest(nonce=served.launch.nonce)) for _ in range(2))
    async with aclosing(first), aclosing(second):
        assert (await anext(first)).replica == (await anext(second)).replica


async def test_it_ends_itself_when_no_agent_ever_comes(serve: Serve) -> None:
    served = await serve(grace_s=0.05)
    await served.host.finished.wait()
    assert served.host.status.state is ReplicaState.STOPPING


async def test_it_ends_itself_when_its_agent_has_left_for_the_grace_period(serve: Serve) -> None:
    served = await serve(grace_s=0.3)
    await served.until(ReplicaState.READY)
    async with aclosing(served.client.attach(AttachRequest(nonce=served.launch.nonce))) as statuses:
        await anext(statuses)
        with pytest.raises(TimeoutError):  # longer than the grace: somebody is attached
            async with asyncio.timeout(0.5):
                await served.host.finished.wait()
    await served.host.finished.wait()


async def test_an_agent_that_comes_back_in_time_saves_it(serve: Serve) -> None:
    served = await serve(grace_s=0.4)
    for _ in range(3):  # each absence is shorter than the grace, all together are longer
        await served.until(ReplicaState.READY)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await served.host.finished.wait()
    assert not served.host.finished.is_set()


async def test_it_tells_its_load(serve: Serve, request_of: Make) -> None:
    served = await serve(gated=True, capacity=2)
    served.clock.let(4)
    await served.until(ReplicaState.READY)
    stream = served.open()
    for stream_id in (1, 2, 3):
        stream.send(request_of(stream_id, [5]))
    status = await served.until_status(lambda status: status.waiting == 1)
    assert (status.running, status.waiting, status.memory_bytes) == (2, 1, 42)


# --- stopping ------------------------------------------------------------------------------


async def test_stop_is_answered_and_then_ends_it(serve: Serve) -> None:
    served = await serve()
    await served.until(ReplicaState.READY)
    await served.client.stop(StopRequest())
    await served.host.finished.wait()


async def test_a_drain_refuses_new_requests_and_lets_running_ones_finish(
    serve: Serve, request_of: Make, collect: Make
) -> None:
    served = await serve(gated=True)
    served.clock.let(4)
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, [5], max_tokens=3))
    await served.until_status(lambda status: status.running == 1)
    await served.client.stop(StopRequest(drain_s=60))
    await served.until(ReplicaState.DRAINING)
    stream.send(request_of(2, [5], max_tokens=3))
    refused = (await collect(stream, 2))[2][-1]
    assert isinstance(refused.finish.error, Unavailable)
    assert not served.host.finished.is_set()
    served.clock.open()
    assert len(tokens((await collect(stream, 1))[1])) == 3
    await served.host.finished.wait()


async def test_a_drain_ends_at_its_limit_and_tells_what_it_cut_short(
    serve: Serve, request_of: Make, collect: Make
) -> None:
    served = await serve(gated=True)
    served.clock.let(4)
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, [5], max_tokens=3))
    await served.until_status(lambda status: status.running == 1)
    await served.client.stop(StopRequest(drain_s=60))
    await served.client.stop(StopRequest(drain_s=0.05))
    finish = (await collect(stream, 1))[1][-1].finish
    assert finish.reason is FinishReason.ERROR
    assert isinstance(finish.error, Unavailable)
    await served.host.finished.wait()


async def test_a_host_that_is_still_building_stops_at_once(serve: Serve) -> None:
    served = await serve(gated=True)
    await served.client.stop(StopRequest(drain_s=60))
    await served.host.finished.wait()


# --- gateways ------------------------------------------------------------------------------


async def test_tokens_come_in_order_with_their_positions(serve: Serve, request_of: Make, collect: Make) -> None:
    served = await serve()
    await served.until(ReplicaState.READY)
    stream = served.open()
    for stream_id in (1, 2):
        stream.send(request_of(stream_id, [5, stream_id], max_tokens=7, logprobs=1))
    outputs = await collect(stream, 1, 2)
    for stream_id in (1, 2):
        assert [output.position for output in outputs[stream_id]] == list(range(7))
        assert outputs[stream_id][0].prefill.num_prompt_tokens == 2
        assert outputs[stream_id][-1].finish.reason is FinishReason.LENGTH
        assert all(output.logprobs.num_rows == 1 for output in outputs[stream_id])
    assert tokens(outputs[1]) != tokens(outputs[2])


async def test_a_resumed_request_starts_at_its_position(serve: Serve, request_of: Make, collect: Make) -> None:
    served = await serve()
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, [5], max_tokens=7))
    whole = tokens((await collect(stream, 1))[1])
    stream.send(request_of(2, [5, *whole[:3]], num_output_tokens=3, max_tokens=7))
    rest = (await collect(stream, 2))[2]
    assert [output.position for output in rest] == [3, 4, 5, 6]
    assert whole[:3] + tokens(rest) == whole


async def test_two_gateways_do_not_see_each_other(serve: Serve, request_of: Make, collect: Make) -> None:
    served = await serve()
    await served.until(ReplicaState.READY)
    one, two = served.open(gateway="one"), served.open(gateway="two")
    one.send(request_of(1, [5], max_tokens=4))
    two.send(request_of(1, [6], max_tokens=5))
    first, second = await asyncio.gather(collect(one, 1), collect(two, 1))
    assert (len(tokens(first[1])), len(tokens(second[1]))) == (4, 5)


async def test_a_refused_request_says_why_and_harms_nobody(serve: Serve, request_of: Make, collect: Make) -> None:
    served = await serve()
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, []))
    stream.send(request_of(2, [5], max_tokens=2))
    outputs = await collect(stream, 1, 2)
    assert isinstance(outputs[1][-1].finish.error, InvalidArgument)
    assert len(tokens(outputs[2])) == 2


async def test_an_aborted_request_frees_its_place_and_says_no_more(
    serve: Serve, request_of: Make, collect: Make
) -> None:
    served = await serve(gated=True)
    served.clock.let(4)
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, [5], max_tokens=100))
    await served.until_status(lambda status: status.running == 1)
    stream.send(AbortRequests(stream_ids=[1, 77]))
    await served.until_status(lambda status: status.running == 0)
    stream.send(request_of(2, [6], max_tokens=2))
    served.clock.open()
    outputs = await collect(stream, 2)
    assert outputs[1] == [] if 1 in outputs else True
    assert len(tokens(outputs[2])) == 2


async def test_a_gateway_that_goes_takes_its_requests_with_it(serve: Serve, request_of: Make) -> None:
    served = await serve(gated=True)
    served.clock.let(4)
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, [5], max_tokens=100))
    await served.until_status(lambda status: status.running == 1)
    await stream.close()
    await served.until_status(lambda status: status.running == 0)


async def test_another_generation_is_refused(serve: Serve) -> None:
    served = await serve()
    with pytest.raises(StaleGeneration):
        await anext(served.open(generation=6).steps())


async def test_another_protocol_version_is_refused(serve: Serve) -> None:
    served = await serve()
    with pytest.raises(InvalidArgument, match="protocol 2"):
        await anext(served.open(protocol_version=2).steps())


async def test_a_stream_that_does_not_open_itself_is_refused(serve: Serve, request_of: Make) -> None:
    served = await serve()
    stream = served.client.open_stream(request_of(1, [5]))
    served.streams.append(stream)
    with pytest.raises(InvalidArgument, match="begin by opening"):
        await anext(stream.steps())


async def test_a_stream_id_that_is_in_use_breaks_the_stream(serve: Serve, request_of: Make) -> None:
    served = await serve(gated=True)
    served.clock.let(4)
    await served.until(ReplicaState.READY)
    stream = served.open()
    for _ in range(2):
        stream.send(request_of(1, [5]))
    with pytest.raises(InvalidArgument, match="twice"):
        await anext(stream.steps())


async def test_a_host_that_is_not_ready_takes_no_requests(serve: Serve, request_of: Make, collect: Make) -> None:
    served = await serve(gated=True)
    stream = served.open()
    stream.send(request_of(1, [5]))
    finish = (await collect(stream, 1))[1][-1].finish
    assert isinstance(finish.error, Unavailable)


# --- failures ------------------------------------------------------------------------------


async def test_a_failed_build_is_told_with_its_reason_and_waits_to_be_stopped(serve: Serve) -> None:
    served = await serve(fake=FakeSettings(build_error="no such thing"))
    status = await served.until(ReplicaState.FAILED)
    assert (status.error, status.error_reason) == ("no such thing", "ENGINE_FAILED")
    assert not served.host.finished.is_set()
    await served.client.stop(StopRequest(drain_s=60))
    await served.host.finished.wait()


async def test_an_engine_that_breaks_ends_every_request_with_its_own_words(
    serve: Serve, request_of: Make, collect: Make
) -> None:
    served = await serve(gated=True, fake=FakeSettings(crash_at=3))
    served.clock.let(4)  # its build
    await served.until(ReplicaState.READY)
    stream = served.open()
    for stream_id in (1, 2):
        stream.send(request_of(stream_id, [5], max_tokens=9))
    await served.until_status(lambda status: status.running == 2)
    served.clock.open()
    outputs = await collect(stream, 1, 2)
    for stream_id in (1, 2):
        finish = outputs[stream_id][-1].finish
        assert finish.reason is FinishReason.ERROR
        assert isinstance(finish.error, EngineFailed)
        assert "break at position 3" in finish.error.message
    status = await served.until(ReplicaState.FAILED)
    assert "break at position 3" in status.error
    stream.send(request_of(3, [5]))
    late = (await collect(stream, 3))[3][-1].finish.error
    assert isinstance(late, Unavailable), "it was not to blame, and may go elsewhere as often as it likes"
    assert "break at position 3" in late.message


async def test_a_request_whose_answer_would_be_too_large_is_refused_alone(
    serve: Serve, request_of: Make, collect: Make
) -> None:
    served = await serve()
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, [1] * 131_072, prompt_logprobs=20))
    stream.send(request_of(2, [1, 2, 3], max_tokens=2))
    outputs = await collect(stream, 1, 2)
    assert isinstance(outputs[1][-1].finish.error, InvalidArgument)
    assert outputs[2][-1].finish.reason is FinishReason.LENGTH
