"""When an engine hangs, and what its host does; signs of life."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from sllm.core.replica import ReplicaState
from sllm.core.tokens import FinishReason, StepOutputs
from sllm.engine.watchdog import Watchdog
from sllm.errors import EngineFailed
from sllm.rpc.engine import StopRequest

Serve = Callable[..., Any]
Make = Callable[..., Any]


def beats(watchdog: Watchdog, *seen: tuple[bool, int]) -> list[bool]:
    return [watchdog.hangs(working, steps) for working, steps in seen]


def test_an_engine_hangs_that_works_for_the_limit_without_a_step() -> None:
    watchdog = Watchdog(stall_s=3, beat_s=1)
    assert beats(watchdog, (True, 4), (True, 4), (True, 4), (True, 4)) == [False, False, False, True]


@pytest.mark.parametrize("between", [(True, 5), (False, 4)], ids=["a step", "a rest"])
def test_a_step_or_a_rest_begins_the_count_again(between: tuple[bool, int]) -> None:
    watchdog = Watchdog(stall_s=2, beat_s=1)
    assert beats(watchdog, (True, 4), (True, 4), between, (True, between[1]), (True, between[1])) == [
        *(False, False, False, False),
        True,
    ]


def test_the_first_step_may_take_longer() -> None:
    watchdog = Watchdog(stall_s=2, beat_s=1)
    assert beats(watchdog, *[(True, 0)] * 10) == [False] * 9 + [True]


async def test_an_engine_that_hangs_fails_its_requests_and_its_replica(
    serve: Serve, request_of: Make, collect: Make
) -> None:
    served = await serve(gated=True, beat_s=0.01, stall_s=0.05)
    served.clock.let(4 + 2)  # its build, and two steps
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, [5], max_tokens=9))
    outputs = (await collect(stream, 1))[1]
    assert [output.position for output in outputs] == [0, 1, 2]
    finish = outputs[-1].finish
    assert finish.reason is FinishReason.ERROR
    assert isinstance(finish.error, EngineFailed)
    assert "no step for 0.05 s" in finish.error.message
    status = await served.until(ReplicaState.FAILED)
    assert status.error_reason == "ENGINE_FAILED"
    await served.client.stop(StopRequest())
    await served.host.finished.wait()


async def test_an_engine_that_rests_does_not_hang(serve: Serve, request_of: Make, collect: Make) -> None:
    served = await serve(beat_s=0.005, stall_s=0.01)
    await served.until(ReplicaState.READY)
    stream = served.open()
    stream.send(request_of(1, [5], max_tokens=2))
    await collect(stream, 1)
    with pytest.raises(TimeoutError):  # many times the limit
        async with asyncio.timeout(0.2):
            await served.until(ReplicaState.FAILED)


async def test_a_gateway_with_requests_gets_signs_of_life_that_count_steps(serve: Serve, request_of: Make) -> None:
    served = await serve(gated=True, beat_s=0.01)
    served.clock.let(4 + 2)
    await served.until(ReplicaState.READY)
    stream, idle = served.open(), served.open(gateway="idle")
    stream.send(request_of(1, [5], max_tokens=9))
    seen: list[StepOutputs] = []
    async with aclosing(stream.steps()) as steps:
        async for step in steps:
            seen.append(step)
            if len(seen) == 5:
                break
    assert [len(step.outputs) for step in seen] == [1, 1, 0, 0, 0]
    assert [step.steps for step in seen[2:]] == [2, 2, 2]
    assert seen[0].steps <= seen[1].steps <= 2
    served.clock.open()
    async with aclosing(idle.steps()) as steps:
        idle.send(request_of(1, [6], max_tokens=1))
        assert (await anext(steps)).outputs, "nothing came before it had a request"
