"""Engines that do not start, and agents that do not do as they are told."""

from __future__ import annotations

import asyncio

import pytest

from sllm.core.deployment import DeploymentState
from sllm.core.replica import ReplicaState
from sllm.errors import Conflict, EngineFailed, InvalidArgument, Unavailable

BROKEN = ("CUDA ate the homework", "ENGINE_FAILED")


async def starts_seen(bench, agent, count):
    await bench.until(lambda: len(agent.starts()) == count)


async def test_held_requests_get_the_engines_reason_after_three_failures(bench):
    agent = await bench.add("a")
    agent.breaks = BROKEN
    await bench.deploy()
    request = asyncio.create_task(bench.gateway.acquire())
    for count, wait in ((1, 1), (2, 2)):
        await starts_seen(bench, agent, count)
        await bench.until(lambda: not agent.replicas)
        assert not request.done()
        await bench.advance(wait)
    with pytest.raises(EngineFailed, match="CUDA ate the homework") as caught:
        await request
    assert (len(agent.starts()), caught.value.retry_after_s) == (3, 4.0)
    row = await bench.row()
    assert row.state is DeploymentState.FAILED
    assert "CUDA ate the homework" in row.reason
    with pytest.raises(EngineFailed, match="homework"):
        await bench.gateway.acquire()
    await bench.quiet()
    assert (len(agent.starts()), agent.replicas) == (3, {})


async def test_retries_wait_for_their_time(bench):
    agent = await bench.add("a")
    agent.breaks = BROKEN
    await bench.deploy()
    request = asyncio.create_task(bench.gateway.acquire())
    await starts_seen(bench, agent, 1)
    await bench.until(lambda: not agent.replicas)
    await bench.advance(0.9)
    assert len(agent.starts()) == 1
    await bench.advance(0.1)
    assert len(agent.starts()) == 2
    request.cancel()


async def test_after_the_cool_down_one_more_try_is_made_and_may_succeed(bench):
    agent = await bench.add("a")
    agent.breaks = BROKEN
    await bench.deploy(max_replicas=2)
    request = asyncio.create_task(bench.gateway.acquire())
    await bench.advance(4)
    with pytest.raises(EngineFailed):
        await request
    await bench.advance(4)
    assert len(agent.starts()) == 3, "nobody asks for it"
    agent.breaks = None
    await bench.gateway.acquire()
    assert (await bench.row()).state is DeploymentState.READY
    assert bench.controller.world.cluster.deployments["app"].failures is None


async def test_what_would_stay_wrong_fails_at_once(bench):
    agent = await bench.add("a")
    agent.breaks = ("no such architecture: Foo", "UNSUPPORTED_CHECKPOINT")
    operation = await bench.deploy(min_replicas=1)
    ended = await bench.done(operation)
    assert (ended.state, ended.error_reason) == ("failed", "UNSUPPORTED_CHECKPOINT")
    assert "no such architecture: Foo" in ended.error
    with pytest.raises(EngineFailed, match="Foo"):
        await bench.gateway.acquire()
    assert len(agent.starts()) == 1


async def test_deploying_again_tries_again_at_once(bench):
    agent = await bench.add("a")
    agent.breaks = ("bad", "INVALID_ARGUMENT")
    await bench.done(await bench.deploy(min_replicas=1))
    agent.breaks = None
    assert (await bench.done(await bench.deploy(min_replicas=1))).state == "done"
    assert bench.ready() == 1


async def test_scaling_tries_again_at_once_too(bench):
    agent = await bench.add("a")
    agent.breaks = ("bad", "INVALID_ARGUMENT")
    await bench.done(await bench.deploy(min_replicas=1))
    agent.breaks = None
    assert (await bench.done(await bench.scale(replicas=1))).state == "done"


async def test_a_failed_new_revision_leaves_the_old_one_serving(bench):
    agents = [await bench.add(name) for name in "ab"]
    await bench.done(await bench.deploy(min_replicas=1))
    (old,) = bench.replicas()
    for agent in agents:
        agent.breaks = ("bad", "INVALID_ARGUMENT")
    assert (await bench.done(await bench.deploy(min_replicas=1, max_model_len=32))).state == "failed"
    assert (await bench.gateway.acquire()).replica == old.spec.id
    assert [t.replica for t in (await bench.table())["app"].targets] == [old.spec.id]


async def test_another_node_is_tried_first_after_a_failure(bench):
    one, other = await bench.add("a"), await bench.add("b")
    one.breaks = BROKEN
    await bench.deploy()
    request = asyncio.create_task(bench.gateway.acquire())
    await starts_seen(bench, one, 1)
    await bench.until(lambda: not one.replicas)
    await bench.advance(1)
    assert (await request).replica in other.replicas


async def test_an_engine_that_dies_is_replaced_and_routes_forget_it(bench):
    agent = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    (first,) = agent.replicas
    agent.progress(first, state=ReplicaState.FAILED, error="engine died: signal 9", error_reason="ENGINE_FAILED")
    await bench.until(lambda: first not in agent.replicas)
    assert agent.stops()[0].replica == first
    assert (await bench.table())["app"].targets == ()
    await bench.advance(1)
    assert bench.ready() == 1


async def test_a_refused_start_counts_and_its_device_is_free_again(bench):
    agent = await bench.add("a")
    agent.refusal = InvalidArgument("no such flag")
    ended = await bench.done(await bench.deploy(min_replicas=1))
    assert "no such flag" in ended.error
    assert bench.replicas() == []


async def test_a_start_that_conflicts_is_tried_again_without_counting(bench):
    agent = await bench.add("a")
    agent.refusal = Conflict("the device is taken")
    operation = await bench.deploy(min_replicas=1)
    await starts_seen(bench, agent, 1)
    await bench.advance(3)
    assert (await bench.done(operation)).state == "done"
    assert bench.controller.world.cluster.deployments["app"].failures is None


async def test_a_start_that_was_not_answered_is_stopped_before_the_device_is_used_again(bench):
    agent = await bench.add("a")
    agent.refusal = Unavailable("the line went dead")
    operation = await bench.deploy(min_replicas=1)
    await starts_seen(bench, agent, 1)
    await bench.until(lambda: agent.stops())
    assert agent.stops()[0].replica == agent.starts()[0].spec.id
    await bench.advance(3)
    assert (await bench.done(operation)).state == "done"
    assert len(agent.starts()) == 2


async def test_commands_carry_the_epoch_and_generations_grow(bench):
    agent = await bench.add("a", devices=2)
    await bench.done(await bench.deploy(min_replicas=2, max_replicas=2))
    assert [c.epoch for c in agent.starts()] == [1, 1]
    assert sorted(c.spec.generation for c in agent.starts()) == [1, 2]
    assert len({c.spec.devices for c in agent.starts()}) == 2


@pytest.mark.parametrize("reason", ["CAPACITY_EXCEEDED", "INVALID_CHECKPOINT"])
async def test_trouble_of_one_node_is_taken_to_another(bench, reason):
    one, other = await bench.add("a"), await bench.add("b")
    one.breaks = ("not here, not now", reason)
    operation = await bench.deploy(min_replicas=1)
    await starts_seen(bench, one, 1)
    await bench.until(lambda: not one.replicas)
    await bench.advance(1)
    assert (await bench.done(operation)).state == "done"
    assert len(other.starts()) == 1


async def test_an_engine_that_dies_as_soon_as_it_is_ready_is_not_restarted_without_end(bench):
    agent = await bench.add("a")
    await bench.deploy(min_replicas=1)
    for count, wait in ((1, 1), (2, 2), (3, 0)):
        await bench.until(lambda count=count: len(agent.starts()) == count and bench.ready() == 1)
        (replica,) = agent.replicas
        agent.progress(replica, state=ReplicaState.FAILED, error="signal 11", error_reason="ENGINE_FAILED")
        await bench.until(lambda: not agent.replicas)
        await bench.advance(wait)
    await bench.advance(3)
    assert len(agent.starts()) == 3
    row = await bench.row()
    assert (row.state, "signal 11" in row.reason) == (DeploymentState.FAILED, True)
    with pytest.raises(EngineFailed, match="signal 11"):
        await bench.gateway.acquire()
