"""Rounds at the destination: the table of them, and over real gRPC."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from sllm.core.ids import RequestId
from sllm.core.migration import Round
from sllm.core.replica import ReplicaState
from sllm.core.tokens import Finish, FinishReason, Prefill
from sllm.engine.base import Output
from sllm.engine.fake import FakeSettings
from sllm.engine.recomputes import Recomputes
from sllm.errors import Cancelled, InvalidArgument, QueueFull, SllmError, StaleGeneration, Unavailable
from sllm.migration.destination import MAX_AT_ONCE
from sllm.rpc.engine import RecomputeRequest, StopRequest

Serve = Callable[..., Any]
Make = Callable[..., Any]


def ask(request: str = "req-1", tokens: int = 40, generation: int = 7) -> RecomputeRequest:
    return RecomputeRequest(request_id=RequestId(request), generation=generation, token_ids=tuple(range(tokens)))


class Engine:
    """Takes the commands of an engine thread, and carries out none."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.aborted: list[int] = []

    def recompute(self, key: int, token_ids: list[int], cache_salt: str) -> None:
        self.asked.append(key)

    def abort(self, keys: list[int]) -> None:
        self.aborted += keys


def table() -> tuple[Recomputes, Engine]:
    keys, engine = itertools.count(1), Engine()
    return Recomputes(engine, lambda: next(keys)), engine


async def begun(recomputes: Recomputes, *requests: RecomputeRequest) -> list[asyncio.Task[Round]]:
    """Begin rounds and return them once each has asked the engine, or has failed."""
    tasks = [asyncio.create_task(recomputes.run(request)) for request in requests]
    await asyncio.sleep(0)  # tasks begin in the order in which they were made
    return tasks


def done(key: int, cached_tokens: int = 16, error: SllmError | None = None) -> Output:
    finish = Finish(reason=FinishReason.ERROR if error else FinishReason.LENGTH, error=error)
    prefill = None if error else Prefill(num_prompt_tokens=40, num_cached_tokens=cached_tokens)
    return Output(key=key, token_ids=[], finish=finish, prefill=prefill)


async def test_what_a_step_made_for_a_round_ends_it_and_goes_no_further() -> None:
    recomputes, engine = table()
    (task,) = await begun(recomputes, ask())
    others = [Output(key=77, token_ids=[5])]
    assert recomputes.take([*others, done(engine.asked[0])]) == others
    round_ = await task
    assert (round_.tokens, round_.cached_tokens) == (40, 16)
    assert engine.aborted == []


async def test_a_round_whose_caller_goes_is_aborted_at_once() -> None:
    recomputes, engine = table()
    (task,) = await begun(recomputes, ask())
    task.cancel()
    await asyncio.wait([task])
    assert engine.aborted == engine.asked
    assert recomputes.take([done(engine.asked[0])]) == [done(engine.asked[0])], "nobody's any more"


async def test_a_newer_round_of_a_request_replaces_the_older() -> None:
    recomputes, engine = table()
    old, new = await begun(recomputes, ask(), ask(tokens=50))
    with pytest.raises(Cancelled, match="req-1"):
        await old
    assert engine.aborted == engine.asked[:1]
    recomputes.take([done(engine.asked[1])])
    assert (await new).tokens == 50


async def test_a_request_that_resumes_ends_its_round_and_no_other() -> None:
    recomputes, engine = table()
    mine, other = await begun(recomputes, ask("req-1"), ask("req-2"))
    recomputes.drop(RequestId("req-1"))
    with pytest.raises(Cancelled):
        await mine
    recomputes.take([done(engine.asked[1])])
    assert (await other).cached_tokens == 16


async def test_only_so_many_rounds_are_under_way_and_closing_ends_them() -> None:
    recomputes, engine = table()
    *kept, refused = await begun(recomputes, *(ask(f"req-{n}") for n in range(MAX_AT_ONCE + 1)))
    with pytest.raises(QueueFull, match="too many"):
        await refused
    recomputes.close(Unavailable("stopping"))
    for task in kept:
        with pytest.raises(Unavailable, match="stopping"):
            await task
    assert engine.aborted == engine.asked
    assert len(engine.asked) == MAX_AT_ONCE


async def test_what_the_engine_refuses_the_caller_is_told() -> None:
    recomputes, engine = table()
    (task,) = await begun(recomputes, ask())
    recomputes.take([done(engine.asked[0], error=InvalidArgument("too long"))])
    with pytest.raises(InvalidArgument, match="too long"):
        await task


async def test_rounds_fill_the_prefix_cache_from_where_the_last_one_ended(serve: Serve) -> None:
    served = await serve()
    await served.until(ReplicaState.READY)
    rounds = [await served.client.recompute(ask(tokens=tokens), timeout_s=10) for tokens in (40, 70)]
    assert [(each.tokens, each.cached_tokens) for each in rounds] == [(40, 0), (70, 32)]
    assert all(each.seconds >= 0 for each in rounds)


async def test_a_request_that_resumes_after_rounds_finds_its_blocks(
    serve: Serve, request_of: Make, collect: Make
) -> None:
    served = await serve()
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, list(range(30)), max_tokens=20))
    whole = [token for output in (await collect(stream, 1))[1] for token in output.token_ids]
    prompt = list(range(100, 130))
    await served.client.recompute(
        RecomputeRequest(request_id=RequestId("req-2"), generation=7, token_ids=tuple(prompt)), timeout_s=10
    )
    stream.send(request_of(2, prompt, max_tokens=20))
    outputs = (await collect(stream, 2))[2]
    assert outputs[0].prefill.num_cached_tokens == 16
    assert len(whole) == sum(len(output.token_ids) for output in outputs) == 20


async def test_no_rounds_are_done_for_another_generation_or_by_a_host_that_is_going(
    serve: Serve, request_of: Make
) -> None:
    served = await serve(gated=True)
    with pytest.raises(Unavailable, match="starting"):
        await served.client.recompute(ask(), timeout_s=10)
    served.clock.let(4)
    await served.until(ReplicaState.READY)
    with pytest.raises(StaleGeneration):
        await served.client.recompute(ask(generation=6), timeout_s=10)
    stream = served.open()
    stream.send(request_of(1, [5], max_tokens=100))
    await served.until_status(lambda status: status.running == 1)
    await served.client.stop(StopRequest(drain_s=60))
    with pytest.raises(Unavailable, match="draining"):
        await served.client.recompute(ask(), timeout_s=10)


async def test_a_host_whose_engine_broke_does_no_rounds(serve: Serve, request_of: Make) -> None:
    served = await serve(fake=FakeSettings(crash_at=3), capacity=1)
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, [5], max_tokens=100))
    await served.until(ReplicaState.FAILED)
    with pytest.raises(Unavailable, match="position 3"):
        await served.client.recompute(ask(), timeout_s=10)
