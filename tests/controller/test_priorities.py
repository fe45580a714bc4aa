"""How urgent starts are, from a request's arrival to the agent that loads for it (paper §3: the loading queue)."""

from __future__ import annotations

import asyncio

from sllm.core.priority import Priority
from sllm.errors import Unavailable

REQUEST, PREWARM = Priority.REQUEST, Priority.PREWARM


def told(agent):
    return [command.priority for command in agent.starts()]


async def started_ahead(bench):
    """Return an agent that has begun to start a deployment's minimum, and holds it there."""
    agent = await bench.add("a")
    agent.held = True
    await bench.deploy(min_replicas=1)
    await bench.until(lambda: [r.status is not None for r in bench.replicas()] == [True])
    return agent


async def test_a_start_for_a_request_is_more_urgent_than_one_for_the_minimum(bench):
    agent = await bench.add("a", devices=2)
    await bench.deploy("kept", min_replicas=1)
    await bench.until(lambda: bench.ready("kept"))
    await bench.deploy("asleep")
    await bench.gateway.acquire("asleep")
    assert told(agent) == [PREWARM, REQUEST]


async def test_a_request_that_comes_meanwhile_raises_the_start_it_waits_for_once(bench):
    agent = await started_ahead(bench)
    requests = [asyncio.create_task(bench.gateway.acquire()) for _ in range(2)]
    await bench.until(lambda: len(agent.starts()) == 2)
    await bench.quiet()
    first, again = agent.starts()
    assert (first.spec, told(agent)) == (again.spec, [PREWARM, REQUEST])
    agent.finish()
    await asyncio.gather(*requests)
    assert len(bench.replicas()) == 1


async def test_a_raise_that_the_agent_does_not_answer_is_told_again_and_fails_no_start(bench):
    agent = await started_ahead(bench)
    agent.refusal = Unavailable("the line went dead")
    request = asyncio.create_task(bench.gateway.acquire())
    await bench.until(lambda: len(agent.starts()) == 2)
    await bench.quiet()
    assert len(agent.starts()) == 2
    await bench.advance(2.0)
    await bench.until(lambda: len(agent.starts()) == 3)
    assert told(agent) == [PREWARM, REQUEST, REQUEST]
    agent.finish()
    await request
    assert agent.stops() == []


async def test_a_controller_that_does_not_know_how_urgent_a_start_is_tells_it(bench, store):
    agent = await started_ahead(bench)
    await bench.restart(store)
    await agent.join(bench.controller.address)
    request = asyncio.create_task(bench.gateway.acquire())
    await bench.until(lambda: len(agent.starts()) == 2)
    assert told(agent) == [PREWARM, REQUEST]
    agent.finish()
    await request
