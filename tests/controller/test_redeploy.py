"""Changing, scaling and deleting what serves."""

from __future__ import annotations

import asyncio

import pytest

from sllm.core.deployment import DeploymentSpec
from sllm.core.replica import ReplicaState
from sllm.errors import CapacityExceeded, Conflict, InvalidArgument, NotFound
from sllm.rpc.control import DeployRequest


async def test_with_a_free_device_the_old_revision_serves_until_the_new_one_is_ready(bench):
    agents = [await bench.add(name) for name in "ab"]
    await bench.done(await bench.deploy(min_replicas=1))
    (old,) = bench.replicas()
    for agent in agents:
        agent.held = agent.drains = True
    operation = await bench.deploy(min_replicas=1, max_model_len=32)
    await bench.until(lambda: len(bench.replicas()) == 2)
    route = (await bench.table())["app"]
    assert [t.replica for t in route.targets] == [old.spec.id]
    assert (route.deployment.revision, route.max_model_len) == (1, 64), "the front end still fits the old replica"
    assert (await bench.gateway.acquire()).replica == old.spec.id
    new = next(a for a in agents if old.spec.id not in a.replicas)
    new.finish()
    assert (await bench.done(operation)).state == "done"
    route = (await bench.table())["app"]
    assert (route.deployment.revision, route.max_model_len) == (2, 32)
    assert [t.node for t in route.targets] == [new.name]
    await bench.until(lambda: bench.replicas()[0].state is ReplicaState.DRAINING)
    bench.agents[old.node].gone(old.spec.id)
    await bench.until(lambda: len(bench.replicas()) == 1)
    assert bench.controller.world.cluster.deployments["app"].earlier == ()


async def test_without_a_free_device_requests_are_held_while_the_old_one_drains(bench):
    agent = await bench.add("a")
    agent.drains = True
    await bench.deploy(keep_alive_s=600)
    row = await bench.gateway.acquire()
    await bench.gateway.report()
    old = row.replica
    await bench.deploy(keep_alive_s=600, max_model_len=32)
    await bench.until(lambda: agent.replicas[old].state is ReplicaState.DRAINING)
    assert (await bench.table())["app"].targets == ()
    request = asyncio.create_task(bench.gateway.acquire())
    await bench.quiet()
    assert not request.done()
    assert len(agent.starts()) == 1
    agent.gone(old)
    assert (await request).replica != old
    assert agent.starts()[-1].spec.revision == 2


async def test_changing_only_the_scaling_replaces_nothing(bench):
    agent = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    await bench.done(await bench.deploy(min_replicas=1, max_replicas=3, keep_alive_s=1))
    row = await bench.row()
    assert (row.deployment.revision, row.deployment.spec.max_replicas) == (1, 3)
    assert (len(agent.starts()), agent.stops()) == (1, [])


async def test_a_changed_checkpoint_of_the_same_name_is_a_new_revision(bench, tools):
    agent = await bench.add("a")
    await bench.done(await bench.deploy())
    agent.checkpoints["m"] = tools.checkpoint_of("m", digest="other", created_at=5.0)
    agent.changed()
    await bench.quiet()
    await bench.done(await bench.deploy())
    row = await bench.row()
    assert (row.deployment.revision, row.deployment.digest) == (2, "other")


async def test_a_starting_replica_of_an_old_revision_is_stopped(bench):
    agent = await bench.add("a")
    agent.held = True
    await bench.deploy(min_replicas=1)
    await bench.until(lambda: agent.replicas)
    await bench.deploy(min_replicas=1, max_model_len=32)
    await bench.until(lambda: len(agent.starts()) == 2)
    assert agent.stops()[0].replica == agent.starts()[0].spec.id
    agent.finish()
    await bench.until(lambda: bench.ready() == 1)


# -- deleting


async def test_deleting_while_loading_stops_the_start_and_answers_the_held(bench):
    agent = await bench.add("a")
    agent.held = True
    await bench.deploy()
    request = asyncio.create_task(bench.gateway.acquire())
    await bench.until(lambda: agent.replicas)
    operation = await bench.delete()
    with pytest.raises(NotFound, match="deleted"):
        await request
    assert (await bench.done(operation)).state == "done"
    assert (agent.replicas, await bench.row(), await bench.table()) == ({}, None, {})
    with pytest.raises(NotFound):
        await bench.gateway.acquire()


async def test_what_is_being_deleted_is_not_changed(bench):
    agent = await bench.add("a")
    agent.drains = True
    await bench.done(await bench.deploy(min_replicas=1))
    operation = await bench.delete()
    with pytest.raises(Conflict, match="being deleted"):
        await bench.deploy()
    with pytest.raises(Conflict, match="being deleted"):
        await bench.scale(replicas=2)
    await bench.until(lambda: bench.replicas()[0].state is ReplicaState.DRAINING)
    assert (await bench.row()).state == "deleting"
    agent.gone(bench.replicas()[0].spec.id)
    assert (await bench.done(operation)).state == "done"
    assert (await bench.done(await bench.deploy())).state == "done"


async def test_deleting_ends_a_deployment_operation(bench):
    agent = await bench.add("a")
    agent.held = True
    operation = await bench.deploy(min_replicas=1)
    await bench.until(lambda: agent.replicas)
    await bench.delete()
    ended = await bench.done(operation)
    assert (ended.state, ended.error_reason) == ("failed", "NOT_FOUND")


async def test_a_later_deploy_ends_an_earlier_operation(bench):
    agent = await bench.add("a")
    agent.held = True
    operation = await bench.deploy(min_replicas=1)
    await bench.until(lambda: agent.replicas)
    await bench.deploy(min_replicas=1, max_model_len=32)
    assert "again" in (await bench.done(operation)).error


# -- scaling


async def test_scaling_up_is_done_when_they_are_ready(bench):
    for name in "ab":
        await bench.add(name)
    await bench.done(await bench.deploy())
    assert (await bench.done(await bench.scale(replicas=2))).state == "done"
    assert bench.ready() == 2
    spec = (await bench.row()).deployment.spec
    assert (spec.min_replicas, spec.max_replicas) == (2, 2)


async def test_scaling_to_zero_does_not_wait_for_the_keep_alive_and_a_request_wakes_it(bench):
    agent = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1, keep_alive_s=600))
    await bench.gateway.finish(await bench.gateway.acquire())
    await bench.gateway.report()
    assert (await bench.done(await bench.scale(replicas=0))).state == "done"
    assert (bench.replicas(), agent.replicas) == ([], {})
    await bench.gateway.acquire()
    assert bench.ready() == 1


async def test_scaling_to_zero_lets_running_requests_finish_and_starts_nothing_for_them(bench):
    agent = await bench.add("a")
    await bench.add("b")
    agent.drains = True
    await bench.done(await bench.deploy())
    await bench.gateway.acquire()
    await bench.gateway.report()
    operation = await bench.scale(replicas=0)
    await bench.until(lambda: agent.stops())
    await bench.advance(3)
    assert (len(bench.replicas()), len(bench.agents["b"].starts())) == (1, 0)
    agent.gone(bench.replicas()[0].spec.id)
    assert (await bench.done(operation)).state == "done"


async def test_lowering_the_maximum_lets_the_surplus_go(bench):
    for name in "ab":
        await bench.add(name)
    await bench.done(await bench.deploy(min_replicas=2, max_replicas=2))
    assert (await bench.done(await bench.scale(min_replicas=0, max_replicas=1))).state == "done"
    assert bench.ready() == 1


@pytest.mark.parametrize(
    "fields", [{}, {"replicas": -1}, {"min_replicas": 2, "max_replicas": 1}, {"max_replicas": 0, "min_replicas": 0}]
)
async def test_nonsense_bounds_are_refused_and_change_nothing(bench, fields):
    await bench.add("a")
    await bench.done(await bench.deploy())
    before = await bench.row()
    with pytest.raises(InvalidArgument):
        await bench.scale(**fields)
    assert await bench.row() == before


async def test_scaling_what_is_not_there_is_not_found(bench):
    with pytest.raises(NotFound):
        await bench.scale("nothing", replicas=1)
    with pytest.raises(NotFound):
        await bench.delete("nothing")


# -- what is refused at once


async def test_an_unknown_checkpoint_is_not_found_and_the_known_are_named(bench):
    await bench.add("a")
    with pytest.raises(NotFound) as caught:
        await bench.deploy(checkpoint="other")
    assert "m" in caught.value.hint
    assert await bench.row() is None


async def test_more_context_than_the_model_was_made_for_is_refused(bench):
    await bench.add("a")
    with pytest.raises(InvalidArgument, match=r"65 .* 64"):
        await bench.deploy(max_model_len=65)


async def test_a_model_larger_than_the_memory_is_refused_with_both_numbers(bench, tools):
    agent = await bench.add("a", devices=2)
    agent.checkpoints["m"] = tools.checkpoint_of("m", size_bytes=2 * agent.memory_bytes)
    agent.changed()
    await bench.quiet()
    with pytest.raises(CapacityExceeded, match=rf"{2 * agent.memory_bytes} .* {agent.memory_bytes}"):
        await bench.deploy()
    assert (await bench.done(await bench.deploy(devices=2))).state == "done"


async def test_more_devices_than_a_node_has_are_refused_with_both_numbers(bench):
    await bench.add("a", devices=2)
    await bench.add("b", devices=8, checkpoints=())
    with pytest.raises(CapacityExceeded, match=r"needs 3 .* is 2"):
        await bench.deploy(devices=3)


# -- idempotency


async def test_the_same_request_id_is_the_same_operation(bench):
    agent = await bench.add("a")
    first = await bench.deploy(min_replicas=1, request_id="once")
    await bench.done(first)
    again = await bench.deploy(min_replicas=1, max_model_len=32, request_id="once")
    assert again.id == first.id
    assert again.state == "done"
    await bench.quiet()
    assert len(agent.starts()) == 1


async def test_the_same_request_id_at_the_same_time_too(bench):
    await bench.add("a")
    request = DeployRequest(request_id="once", spec=DeploymentSpec(name="app", checkpoint="m"))
    operations = await asyncio.gather(*(bench.control.deploy(request) for _ in range(10)))
    assert len({operation.id for operation in operations}) == 1


async def test_an_unknown_operation_is_not_found(bench):
    with pytest.raises(NotFound, match="op-nope"):
        await bench.done(type("Op", (), {"id": "op-nope"}))
