"""Closing nodes and devices, and emptying a node: what is long moves, what ends soon is waited for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sllm.core.migration import MigrationReport, MigrationState
from sllm.core.node import NodeState
from sllm.core.replica import ReplicaState
from sllm.errors import Conflict, InvalidArgument, NotFound
from sllm.rpc.control import DrainRequest


async def two(bench: Any, **spec: Any) -> tuple[Any, Any]:
    """Two nodes, each with a ready replica of one deployment."""
    for name in "ab":
        (await bench.add(name)).migrates = bench.moves_all
    await bench.done(await bench.deploy(**{"min_replicas": 2, "max_replicas": 2, **spec}))
    return tuple(sorted(bench.replicas(), key=lambda r: r.node))


def nodes_of(bench: Any) -> list[str]:
    return [replica.node for replica in bench.replicas()]


# -- cordon


async def test_nothing_new_is_placed_on_a_cordoned_node_and_what_runs_stays(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    await bench.cordon("a")
    node = await bench.node("a")
    assert (node.state, node.cordoned) == (NodeState.CORDONED, True)
    assert bench.ready() == 1
    assert len((await bench.table())["app"].targets) == 1, "it takes requests as before"
    await bench.scale(replicas=2)
    await bench.quiet()
    assert nodes_of(bench) == ["a"]
    await bench.add("b")
    await bench.until(lambda: sorted(nodes_of(bench)) == ["a", "b"])


async def test_nothing_new_is_placed_on_a_cordoned_device(bench):
    agent = await bench.add("a", devices=2)
    await bench.cordon("a", device="a-d0")
    await bench.done(await bench.deploy(min_replicas=1))
    assert agent.starts()[0].spec.devices == ("a-d1",)
    await bench.scale(replicas=2)
    await bench.quiet()
    assert len(bench.replicas()) == 1
    node = await bench.node("a")
    assert (node.state, node.cordoned_devices) == (NodeState.READY, ("a-d0",))
    await bench.cordon("a", cordoned=False, device="a-d0")
    await bench.until(lambda: len(bench.replicas()) == 2)
    assert (await bench.node("a")).cordoned_devices == ()


async def test_a_cordon_outlives_the_controller_and_the_node(bench, store):
    agent = await bench.add("a", devices=2)
    await bench.cordon("a")
    await bench.cordon("a", device="a-d1")
    await bench.restart(store)
    await agent.join(bench.controller.address)
    node = await bench.node("a")
    assert (node.cordoned, node.cordoned_devices) == (True, ("a-d1",))
    agent.silent = True
    await bench.advance(20)
    assert (await bench.node("a")).state is NodeState.DEAD
    agent.silent = False
    await agent.join(bench.controller.address)
    assert (await bench.node("a")).state is NodeState.CORDONED


async def test_what_is_not_there_cannot_be_cordoned(bench):
    await bench.add("a")
    with pytest.raises(NotFound, match="no node 'z'"):
        await bench.cordon("z")
    with pytest.raises(NotFound, match="no device 'd9'") as caught:
        await bench.cordon("a", device="d9")
    assert "a-d0" in caught.value.hint


# -- drain


async def test_an_idle_node_is_empty_at_once_and_stays_cordoned(bench):
    await two(bench)
    done = await bench.done(await bench.drain("a"))
    assert (done.state, done.kind, done.target, done.phase) == ("done", "drain", "a", "0 moved, 0 finished")
    assert (await bench.node("a")).state is NodeState.CORDONED
    assert nodes_of(bench) == ["b"]
    await bench.advance(3)
    assert nodes_of(bench) == ["b"], "nothing comes back"
    await bench.cordon("a", cordoned=False)
    await bench.until(lambda: sorted(nodes_of(bench)) == ["a", "b"])


async def test_what_is_long_moves_and_the_replica_ends_when_it_is_empty(bench):
    source, target = await two(bench)
    for number in range(3):
        await bench.request(source, f"req-{number}", output_tokens=number)
    operation = await bench.drain("a")
    done = await bench.done(operation)
    assert (done.state, done.phase) == ("done", "3 moved, 0 finished")
    assert {row.replica for row in bench.controller.world.rows().values()} == {target.spec.id}
    (stop,) = bench.agents["a"].stops()
    assert stop.replica == source.spec.id
    assert stop.drain_s > 0, "what it got meanwhile may finish"


async def test_a_node_that_drains_gets_no_new_request(bench):
    source, target = await two(bench)
    bench.agents["a"].migrates = never
    await bench.request(source, "req-1")
    await bench.drain("a")
    await bench.quiet()
    assert [t.replica for t in (await bench.table())["app"].targets] == [target.spec.id]
    assert (await bench.node("a")).state is NodeState.DRAINING
    status = next(r for r in bench.replicas() if r.node == "a")
    assert status.state is ReplicaState.DRAINING
    assert bench.agents["a"].stops() == [], "its request goes on"


async def test_a_replacement_is_started_elsewhere_first(bench):
    a = await bench.add("a")
    a.migrates = bench.moves_all
    await bench.done(await bench.deploy(min_replicas=1, max_replicas=1))
    (source,) = bench.replicas()
    b = await bench.add("b")
    b.held = True
    await bench.request(source, "req-1")
    operation = await bench.drain("a")
    await bench.until(lambda: b.replicas)
    await bench.quiet()
    assert (a.orders(), a.stops()) == ([], [])
    assert bench.operation(operation).phase == "0 of 1 requests moved; 1 wait for room elsewhere"
    b.finish()
    assert (await bench.done(operation)).phase == "1 moved, 0 finished"
    assert nodes_of(bench) == ["b"]


async def test_what_ends_soon_is_waited_for(bench):
    source, _ = await two(bench)
    await teach(bench, source)
    soon = await bench.request(source, "req-soon", output_tokens=990, interval_s=0.01)
    await bench.request(source, "req-long", output_tokens=10, interval_s=0.01)
    operation = await bench.drain("a")
    await bench.until(lambda: bench.operation(operation).phase == "1 of 2 requests moved; waiting for 1 to finish")
    assert [o.requests for o in bench.agents["a"].orders()][-1] == ("req-long",)
    assert bench.operation(operation).progress == 0.5
    await bench.gateway.finish(soon)
    assert (await bench.done(operation)).state == "done"


async def teach(bench: Any, source: Any) -> None:
    """Let one migration show that a recompute of 100 tokens takes half a second."""
    await bench.request(source, "req-0")
    await bench.done(await bench.migrate("b", request="req-0"))
    del bench.gateway.rows["req-0"]
    await bench.gateway.report()


async def never(order):
    await asyncio.Event().wait()
    yield MigrationReport(migration=order.id, request="", state=MigrationState.QUEUED)


async def test_at_the_deadline_it_says_exactly_what_is_left_and_that_goes_on(bench):
    source, _ = await two(bench)
    bench.agents["a"].migrates = never
    await bench.request(source, "req-1")
    operation = await bench.drain("a", 10.0)
    await bench.advance(11)
    done = await bench.done(operation)
    assert (done.state, done.error_reason) == ("failed", "OPERATION_FAILED")
    assert f"left are req-1 on {source.spec.id}" in done.error
    assert "stays cordoned" in done.hint
    assert (await bench.node("a")).state is NodeState.CORDONED
    assert bench.agents["a"].stops() == [], "no request is ended"
    await bench.until(lambda: bench.ready() == 2)


async def test_a_failure_is_tried_at_two_other_destinations_then_said(bench):
    for name in "abcde":
        await bench.add(name)
    await bench.done(await bench.deploy(min_replicas=5, max_replicas=5))
    source = next(r for r in bench.replicas() if r.node == "a")
    tried = []

    async def fails(order):
        tried.append(order.target.node)
        report = {"migration": order.id, "request": "req-1", "state": MigrationState.FAILED}
        yield MigrationReport(**report, error="it does not answer", error_reason="UNAVAILABLE")

    bench.agents["a"].migrates = fails
    await bench.request(source, "req-1")
    operation = await bench.drain("a", 20.0)
    await bench.advance(21)
    done = await bench.done(operation)
    assert "req-1" in done.error
    assert "it does not answer" in done.error
    assert len(tried) == len(set(tried)) == 3


async def test_a_drain_goes_on_after_a_restart_and_moves_nothing_twice(bench, store):
    source, target = await two(bench)
    for name in ("req-1", "req-2"):
        await bench.request(source, name)

    async def moves_one(order):
        bench.follow(order.requests[0], target.spec.id)
        yield MigrationReport(migration=order.id, request=order.requests[0], state=MigrationState.MOVED)
        await asyncio.Event().wait()

    a = bench.agents["a"]
    a.migrates = moves_one
    operation = await bench.drain("a")
    await bench.until(lambda: bench.operation(operation).phase.startswith("1 of 2"))
    first = a.orders()[0].requests
    a.progress(source.spec.id, running=1)
    rows = bench.gateway.rows
    await bench.restart(store)
    bench.gateway.rows = rows
    a.migrates = bench.moves_all
    for agent in bench.agents.values():
        await agent.join(bench.controller.address)
    assert (await bench.node("a")).state is NodeState.DRAINING
    await bench.quiet()
    assert a.stops() == [], "before the gateway has reported too: the engine says that it is busy"
    await bench.gateway.report()
    await bench.until(lambda: len(a.orders()) == 2)
    a.progress(source.spec.id, running=0)
    assert (await bench.done(operation)).state == "done"
    assert [o.requests for o in a.orders()] == [first, first[1:]]
    assert (await bench.node("a")).state is NodeState.CORDONED


async def test_uncordoning_ends_a_drain(bench):
    source, _ = await two(bench)
    bench.agents["a"].migrates = never
    await bench.request(source, "req-1")
    operation = await bench.drain("a")
    await bench.until(lambda: bench.agents["a"].orders())
    await bench.cordon("a", cordoned=False)
    done = await bench.done(operation)
    assert (done.state, done.error_reason) == ("failed", "CANCELLED")
    assert (await bench.node("a")).state is NodeState.READY
    assert bench.ready() == 2
    assert len((await bench.table())["app"].targets) == 2
    assert bench.controller.world.flights.moving() == {}


async def test_a_starting_replica_is_stopped(bench):
    a = await bench.add("a")
    a.held = True
    await bench.deploy(min_replicas=1)
    await bench.until(lambda: a.replicas)
    b = await bench.add("b")
    assert (await bench.done(await bench.drain("a"))).state == "done"
    await bench.until(lambda: b.replicas)


async def test_a_node_that_dies_while_it_drains_is_told(bench):
    source, _ = await two(bench)
    bench.agents["a"].migrates = never
    await bench.request(source, "req-1")
    operation = await bench.drain("a")
    await bench.quiet()
    bench.agents["a"].silent = True
    await bench.advance(20)
    done = await bench.done(operation)
    assert (done.state, done.error_reason) == ("failed", "UNAVAILABLE")


async def test_draining_twice_is_one_operation_with_the_later_deadline(bench):
    source, _ = await two(bench)
    bench.agents["a"].migrates = never
    await bench.request(source, "req-1")
    first = await bench.drain("a", 10.0)
    assert (await bench.drain("a", 100.0)).id == first.id
    await bench.advance(20)
    assert bench.operation(first).state == "running"


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("inf"), float("nan")])
async def test_a_deadline_that_is_none(bench, deadline_s):
    await bench.add("a")
    with pytest.raises(InvalidArgument):
        await bench.drain("a", deadline_s)
    assert (await bench.node("a")).state is NodeState.READY


async def test_what_cannot_be_drained(bench):
    agent = await bench.add("a")
    with pytest.raises(NotFound):
        await bench.drain("z")
    agent.silent = True
    await bench.advance(20)
    with pytest.raises(Conflict, match="dead"):
        await bench.drain("a")


async def test_a_dry_run_says_what_would_move_what_would_not_and_what_is_started(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    (source,) = bench.replicas()
    b = await bench.add("b")
    await bench.request(source, "req-1")
    plan = await bench.control.plan_drain(DrainRequest(request_id="", node="a"))
    (move,) = plan.moves
    assert (move.request, move.move, move.target, move.target_node) == ("req-1", True, None, "b")
    assert plan.starts == ("b",)
    assert plan.why == f"stopped once they are empty: {source.spec.id}"
    await bench.quiet()
    assert (b.starts(), (await bench.node("a")).state) == ([], NodeState.READY)
