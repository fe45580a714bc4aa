"""Nodes that come, fall silent and come back, and a controller that restarts under them."""

from __future__ import annotations

import asyncio

import pytest

from sllm.controller.events import CopyEnded
from sllm.controller.store.memory import MemoryStore
from sllm.controller.store.sqlite import SqliteStore
from sllm.core.deployment import DeploymentState
from sllm.core.node import NodeState
from sllm.core.replica import ReplicaState
from sllm.core.snapshot import Intent
from sllm.errors import Conflict, InvalidCheckpoint, NotFound, SllmError, Unavailable
from sllm.rpc.control import AddCheckpointRequest, Empty, ReadLogsRequest
from sllm.rpc.nodes import NodeClient


async def states(bench):
    return {node.report.name: node.state for node in (await bench.control.get_status(Empty())).nodes}


# -- names


async def test_a_second_agent_of_a_name_is_refused_while_the_first_lives(bench, tools):
    first = await bench.add("a")
    twin = await tools.FakeAgent("a").start()
    with pytest.raises(Conflict, match=first.address):
        await twin.join(bench.controller.address)
    assert await first.beat() is False, "the first one goes on undisturbed"
    await twin.stop()


async def test_an_agent_that_was_killed_and_came_back_elsewhere_is_let_in_at_once(bench, tools):
    first = await bench.add("a")
    await first.stop()
    again = await bench.add("a")
    assert again.address != first.address
    (node,) = (await bench.control.get_status(Empty())).nodes
    assert (node.report.address, node.state) == (again.address, NodeState.READY)


async def test_the_same_address_takes_over(bench):
    first = await bench.add("a")
    await first.stop()
    again = await bench.add("a", port=first.port)
    assert again.address == first.address


async def test_a_heartbeat_of_a_replaced_agent_asks_it_to_register_and_is_refused(bench, tools):
    first = await bench.add("a")
    bench.now += 7.0  # silent for longer than it takes to be suspect
    again = await bench.add("a")
    with pytest.raises(Conflict, match=again.address):
        await first.beat()
    await first.stop()


async def test_a_heartbeat_of_an_unknown_node_asks_for_everything(bench, tools):
    agent = await tools.FakeAgent("a").start()
    agent._client = NodeClient(bench.controller.address, None, peer="controller")
    assert await agent.beat() is True
    assert await states(bench) == {"a": NodeState.READY}
    await agent.stop()


async def test_an_older_report_that_comes_late_changes_nothing(bench):
    agent = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    agent.revision -= 1
    late = dict(agent.replicas)
    agent.replicas.clear()
    await agent.beat(full=True)
    agent.replicas, agent.revision = late, agent.revision + 1
    assert bench.ready() == 1


async def test_a_missed_report_is_asked_for(bench):
    agent = await bench.add("a")
    agent.tell = False
    agent.checkpoints.clear()
    agent.changed()
    assert await agent.beat() is True
    assert await agent.beat() is False
    assert (await bench.control.list_checkpoints(Empty())).checkpoints == ()


# -- silence


async def test_a_silent_node_is_suspect_then_dead_and_its_replicas_are_placed_elsewhere(bench):
    lost = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    other = await bench.add("b")
    lost.silent = True
    await bench.advance(7)
    assert await states(bench) == {"a": NodeState.SUSPECT, "b": NodeState.READY}
    assert [t.node for t in (await bench.table())["app"].targets] == ["a"], "what runs there goes on"
    assert other.starts() == []
    await bench.advance(8)
    await bench.until(lambda: bench.ready() == 1 and bench.replicas()[0].node == "b")
    assert (await states(bench))["a"] is NodeState.DEAD
    assert [t.node for t in (await bench.table())["app"].targets] == ["b"]


async def test_nothing_new_is_placed_on_a_suspect_node(bench):
    agent = await bench.add("a")
    await bench.deploy()
    agent.silent = True
    await bench.advance(7)
    request = asyncio.create_task(bench.gateway.acquire())
    await bench.quiet()
    assert (agent.starts(), (await bench.row()).state) == ([], DeploymentState.WAITING)
    agent.silent = False
    await bench.advance(1)
    await request


async def test_a_node_that_comes_back_with_a_replica_that_was_replaced_gives_one_up(bench):
    lost = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1, max_replicas=2, keep_alive_s=5))
    other = await bench.add("b")
    lost.silent = True
    await bench.advance(16)
    await bench.until(lambda: other.replicas)
    lost.silent = False
    await bench.advance(1)
    await bench.until(lambda: bench.ready() == 2)
    await bench.advance(7)
    assert len(bench.replicas()) == 1
    assert sum(len(agent.starts()) for agent in bench.agents.values()) == 2


async def test_a_replica_of_nothing_is_ended(bench, tools):
    agent = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    agent.silent = True
    await bench.advance(16)
    await bench.done(await bench.delete())
    agent.silent = False
    await bench.advance(1)
    await bench.until(lambda: agent.replicas == {})


async def test_a_node_without_a_controller_takes_nothing_from_an_unknown_replica(bench):
    agent = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    (replica,) = bench.replicas()
    agent.gone(replica.spec.id)
    await bench.until(lambda: len(agent.starts()) == 2)
    assert bench.controller.world.cluster.deployments["app"].failures is None


async def test_a_stop_that_a_node_did_not_hear_is_repeated(bench):
    agent = await bench.add("a")
    agent.drains = True
    await bench.done(await bench.deploy(min_replicas=1))
    await agent._server.stop(None)
    await bench.scale(replicas=0)
    await bench.until(lambda: bench.replicas()[0].retry_at)
    agent.incarnation = "a-restarted"
    await agent.start()
    await agent.join(bench.controller.address)
    async with asyncio.timeout(20):
        while not agent.stops():  # the channel has a back-off of its own, in real time
            await bench.advance(2)
    assert bench.replicas()[0].intent is Intent.DRAIN


# -- restarts of the controller


@pytest.fixture(params=["memory", "sqlite"])
async def durable(request, tmp_path):
    """A store, and how a restarted controller opens it again."""
    held = []

    async def reopen():
        if request.param == "memory":
            held.append(held[0] if held else MemoryStore())
        else:
            if held:
                await held[-1].close()
            held.append(await SqliteStore.open(tmp_path))
        return held[-1]

    yield reopen
    await held[-1].close()


async def rejoin(bench, *names):
    for name in names:
        await bench.agents[name].join(bench.controller.address)


async def test_a_restarted_controller_adopts_what_runs_and_starts_nothing_twice(durable, tools):
    async with tools.opened(await durable()) as bench:
        one, other = await bench.add("a"), await bench.add("b")
        await bench.done(await bench.deploy(min_replicas=1, keep_alive_s=600))
        (before,) = bench.replicas()
        await bench.restart(await durable())
        await rejoin(bench, "b")
        await bench.quiet()
        assert bench.replicas() == [], "the node that runs it has not reported yet"
        request = asyncio.create_task(bench.gateway.acquire())
        await rejoin(bench, "a")
        assert (await request).replica == before.spec.id
        (after,) = bench.replicas()
        assert (after.spec, after.node) == (before.spec, before.node)
        await bench.advance(20)
        assert len(one.starts()) + len(other.starts()) == 1
        table = await bench.table()
        assert [t.replica for t in table["app"].targets] == [before.spec.id]


async def test_epochs_and_generations_grow_over_restarts(durable, tools):
    async with tools.opened(await durable()) as bench:
        agent = await bench.add("a", devices=2)
        await bench.done(await bench.deploy(min_replicas=1))
        await bench.restart(await durable())
        await rejoin(bench, "a")
        await bench.done(await bench.scale(replicas=2))
        assert [(c.epoch, c.spec.generation) for c in agent.starts()] == [(1, 1), (2, 2)]


async def test_a_start_under_way_is_adopted_too(durable, tools):
    async with tools.opened(await durable()) as bench:
        agent = await bench.add("a")
        agent.held = True
        operation = await bench.deploy(min_replicas=1)
        await bench.until(lambda: agent.replicas)
        await bench.restart(await durable())
        await rejoin(bench, "a")
        agent.finish()
        assert (await bench.done(operation)).state == "done"
        assert len(agent.starts()) == 1


async def test_a_node_that_does_not_come_back_is_waited_for_only_so_long(durable, tools):
    async with tools.opened(await durable()) as bench:
        await bench.add("a")
        await bench.add("b")
        await bench.done(await bench.deploy())
        await bench.restart(await durable())
        bench.agents["a"].silent = True
        await rejoin(bench, "b")
        seen = []
        request = asyncio.create_task(bench.gateway.acquire(seen=seen))
        await bench.until(lambda: seen)
        assert "restart" in seen[0].phase
        await bench.advance(6)
        assert (await request).replica in bench.agents["b"].replicas


async def test_a_deletion_under_way_goes_on(durable, tools):
    async with tools.opened(await durable()) as bench:
        agent = await bench.add("a")
        agent.drains = True
        await bench.done(await bench.deploy(min_replicas=1))
        operation = await bench.delete()
        await bench.until(lambda: agent.stops())
        await bench.until(lambda: bench.replicas()[0].state is ReplicaState.DRAINING)
        await bench.restart(await durable())
        await rejoin(bench, "a")
        await bench.until(lambda: bench.replicas())
        assert bench.replicas()[0].intent is Intent.DRAIN
        agent.gone(bench.replicas()[0].spec.id)
        assert (await bench.done(operation)).state == "done"
        assert await bench.row() is None


async def test_a_request_id_of_before_the_restart_is_remembered(durable, tools):
    async with tools.opened(await durable()) as bench:
        await bench.add("a")
        operation = await bench.done(await bench.deploy(request_id="once"))
        await bench.restart(await durable())
        assert await bench.deploy(request_id="once") == operation


async def test_both_revisions_of_a_redeploy_are_adopted(durable, tools):
    async with tools.opened(await durable()) as bench:
        one, other = await bench.add("a"), await bench.add("b")
        await bench.done(await bench.deploy(min_replicas=1))
        one.held = other.held = True
        operation = await bench.deploy(min_replicas=1, max_model_len=32)
        await bench.until(lambda: other.replicas)
        await bench.restart(await durable())
        await rejoin(bench, "a", "b")
        await bench.until(lambda: len(bench.replicas()) == 2)
        route = (await bench.table())["app"]
        assert (route.deployment.revision, len(route.targets)) == (1, 1)
        other.finish()
        assert (await bench.done(operation)).state == "done"
        assert (await bench.table())["app"].deployment.revision == 2


async def test_a_controller_that_was_replaced_writes_nothing_more(tools):
    store = MemoryStore()
    async with tools.opened(store) as old:
        await old.add("a")
        async with tools.opened(store):
            with pytest.raises(Conflict, match="taken over"):
                await old.deploy()


async def test_a_controller_that_cannot_store_what_it_decides_ends(tools):
    store = MemoryStore()
    async with tools.opened(store) as old:
        agent = await old.add("a")
        await old.done(await old.deploy())
        async with tools.opened(store):
            with pytest.raises(Unavailable):
                await old.gateway.acquire()
            assert isinstance(old.controller.writing.exception(), Conflict)
            assert agent.starts() == []


class FullDisk(MemoryStore):
    """Stores until it is full."""

    full = False

    async def txn(self, when, then):
        if self.full:
            raise SllmError("the state store failed: database or disk is full")
        return await super().txn(when, then)


async def test_what_was_acknowledged_is_stored_or_the_controller_ends(tools):
    store = FullDisk()
    async with tools.opened(store) as bench:
        await bench.add("a")
        store.full = True
        asked = [bench.deploy("one"), bench.deploy("two"), bench.gateway.acquire("one")]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        # Which of the calls comes first is the wire's to say; the others find the writer gone.
        assert any("disk is full" in str(answer) for answer in answers)
        assert all(isinstance(answer, SllmError) for answer in answers)
        assert "disk is full" in str(bench.controller.writing.exception())
        store.full = False
        await bench.restart(store)
        assert await bench.row("one") is None


async def test_an_outcome_that_nobody_waits_for_is_stored_or_the_controller_ends(tools):
    store = FullDisk()
    async with tools.opened(store) as bench:
        agent = await bench.add("a")
        agent.sources = {"/models/new": "digest-new"}
        request = AddCheckpointRequest(request_id="r", name="new", source="/models/new", nodes=("a",))
        agent.add_goes_on.clear()
        operation = await bench.control.add_checkpoint(request)
        await bench.until(lambda: agent.commands)
        store.full = True
        bench.controller.inbox.post(CopyEnded(operation=operation.id, error=InvalidCheckpoint("truncated")))
        await asyncio.wait([bench.controller.writing], timeout=5)
        assert "disk is full" in str(bench.controller.writing.exception())
        store.full = False
        agent.add_goes_on.set()
        await bench.restart(store)
        await rejoin(bench, "a")
        assert (await bench.done(operation)).state == "done"


async def test_held_requests_are_told_that_the_controller_stops(store, tools):
    async with tools.opened(store) as bench:
        agent = await bench.add("a")
        agent.held = True
        await bench.deploy()
        request = asyncio.create_task(bench.gateway.acquire())
        await bench.until(lambda: agent.replicas)
        await bench._stack.aclose()
        with pytest.raises((Unavailable, asyncio.CancelledError)):
            await request


# -- logs


async def test_logs_are_read_where_they_are(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    (replica,) = bench.replicas()

    async def read(target):
        return [c.text async for c in bench.control.read_logs(ReadLogsRequest(target=target, lines=7))]

    assert await read(replica.spec.id) == [f"a:{replica.spec.id}:7"]
    assert await read("a") == ["a::7"]
    for unknown in ("rep-none", "b"):
        with pytest.raises(NotFound, match=unknown):
            await read(unknown)
