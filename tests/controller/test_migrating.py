"""Moving requests and replicas from node to node, on command."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sllm.core.device import DeviceKind
from sllm.core.migration import MigrationReport, MigrationState
from sllm.core.replica import ReplicaState
from sllm.errors import CapacityExceeded, Conflict, InvalidArgument, NotFound, QueueFull, SllmError, Unavailable
from sllm.rpc.control import Empty, MigrateRequest


async def two(bench: Any, **spec: Any) -> tuple[Any, Any]:
    """Two nodes, each with a ready replica of one deployment; the requests of each move when they are told to."""
    for name in "ab":
        agent = await bench.add(name)
        agent.migrates = bench.moves_all
    await bench.done(await bench.deploy(**{"min_replicas": 2, "max_replicas": 2, **spec}))
    return tuple(sorted(bench.replicas(), key=lambda r: r.node))


async def test_a_request_moves_to_the_replica_on_the_node_that_is_named(bench):
    source, target = await two(bench)
    await bench.request(source, "req-1")
    done = await bench.done(await bench.migrate("b", request="req-1"))
    assert (done.state, done.kind, done.target) == ("done", "migrate", "req-1")
    assert done.phase == "1 moved, 1 round, 400 bytes sent"
    (order,) = bench.agents["a"].orders()
    assert (order.replica, order.generation) == (source.spec.id, source.spec.generation)
    assert (order.requests, order.target.replica) == (("req-1",), target.spec.id)
    assert order.target.address == target.status.address
    assert bench.agents["b"].orders() == []


async def test_where_it_went_is_known_before_its_gateway_says_so(bench):
    source, target = await two(bench)
    await bench.request(source, "req-1")
    await bench.done(await bench.migrate("b", request="req-1"))
    assert bench.controller.world.rows()["req-1"].replica == target.spec.id
    done = await bench.done(await bench.migrate("a", request="req-1"))
    assert done.state == "done", "and it can go back at once"
    assert [o.replica for o in bench.agents["b"].orders()] == [target.spec.id]


async def test_all_of_a_replica_moves_in_one_order(bench):
    source, _ = await two(bench)
    for number in range(3):
        await bench.request(source, f"req-{number}", output_tokens=number)
    done = await bench.done(await bench.migrate("b", replica=source.spec.id))
    (order,) = bench.agents["a"].orders()
    assert sorted(order.requests) == ["req-0", "req-1", "req-2"]
    assert (done.target, done.phase) == (source.spec.id, "3 moved, 3 rounds, 1,200 bytes sent")
    assert bench.ready() == 2, "the replica stays"


async def test_nothing_to_move_is_done_at_once(bench):
    source, _ = await two(bench)
    assert (await bench.done(await bench.migrate("b", replica=source.spec.id))).state == "done"
    assert bench.agents["a"].orders() == []


async def test_a_replica_is_started_where_there_is_none_and_the_source_goes_when_it_is_idle(bench):
    a, b = await bench.add("a"), await bench.add("b")
    a.migrates = bench.moves_all
    b.held = True
    await bench.done(await bench.deploy(min_replicas=1, max_replicas=1, keep_alive_s=1.0))
    (source,) = bench.replicas()
    assert source.node == "a"
    await bench.request(source, "req-1")
    operation = await bench.migrate("b", request="req-1")
    await bench.until(lambda: b.replicas)
    await bench.until(lambda: "starting a replica on b" in bench.operation(operation).phase)
    await bench.advance(3)
    assert (a.orders(), bench.agents["a"].stops()) == ([], []), "it is needed until the request has moved"
    b.finish()
    assert (await bench.done(operation)).state == "done"
    await bench.advance(3)
    assert [r.node for r in bench.replicas()] == ["b"]


async def test_a_start_that_fails_ends_the_migration_and_the_request_goes_on(bench):
    a, b = await bench.add("a"), await bench.add("b")
    await bench.done(await bench.deploy(min_replicas=1, max_replicas=2))
    (source,) = bench.replicas()
    b.breaks = ("no such luck", "ENGINE_FAILED")
    await bench.request(source, "req-1")
    done = await bench.done(await bench.migrate("b", request="req-1"))
    assert (done.state, done.error_reason) == ("failed", "ENGINE_FAILED")
    assert "no such luck" in done.error
    assert a.orders() == []
    assert bench.ready() == 1


async def test_one_that_ends_first_is_not_moved(bench):
    """Paper §5: the source answers as usual."""
    source, _ = await two(bench)
    await bench.request(source, "req-1")

    async def finishes(order):
        del bench.gateway.rows["req-1"]
        yield MigrationReport(migration=order.id, request="req-1", state=MigrationState.FINISHED)

    bench.agents["a"].migrates = finishes
    operation = await bench.migrate("b", request="req-1")
    await bench.advance(1)
    done = await bench.done(operation)
    assert (done.state, done.phase) == ("done", "0 moved, 1 finished first")


async def test_one_that_ends_while_its_destination_starts_has_not_moved(bench):
    await bench.add("a")
    b = await bench.add("b")
    b.held = True
    await bench.done(await bench.deploy(min_replicas=1, max_replicas=2))
    (source,) = bench.replicas()
    row = await bench.request(source, "req-1")
    operation = await bench.migrate("b", request="req-1")
    await bench.until(lambda: b.replicas)
    await bench.gateway.finish(row)
    done = await bench.done(operation)
    assert (done.state, done.phase) == ("done", "0 moved, 1 finished first")


async def test_one_that_goes_on_elsewhere_because_its_engine_died_is_moved_from_there(bench):
    """Its source says that it has ended there, and its gateway that it goes on."""
    for name in "abc":
        await bench.add(name)
    await bench.done(await bench.deploy(min_replicas=3, max_replicas=3))
    replicas = {replica.node: replica for replica in bench.replicas()}
    await bench.request(replicas["a"], "req-1")

    async def dies(order):
        yield MigrationReport(migration=order.id, request="req-1", state=MigrationState.FINISHED)
        bench.follow("req-1", replicas["c"].spec.id)

    bench.agents["a"].migrates = dies
    bench.agents["c"].migrates = bench.moves_all
    operation = await bench.migrate("b", request="req-1")
    await bench.until(lambda: bench.agents["a"].orders())
    await bench.advance(2)
    assert (await bench.done(operation)).phase.startswith("1 moved")
    assert bench.gateway.rows["req-1"].replica == replicas["b"].spec.id


async def test_one_that_fails_is_told_with_its_reason(bench):
    """Paper §5: the destination died; the source goes on as if nothing had happened."""
    source, _ = await two(bench)
    await bench.request(source, "req-1")

    async def fails(order):
        report = {"migration": order.id, "request": "req-1", "state": MigrationState.FAILED}
        yield MigrationReport(**report, error="rep-b cannot be reached", error_reason="UNAVAILABLE")

    bench.agents["a"].migrates = fails
    operation = await bench.migrate("b", request="req-1")
    await bench.advance(3)
    done = await bench.done(operation)
    assert (done.state, done.error, done.error_reason) == ("failed", "rep-b cannot be reached", "UNAVAILABLE")
    assert bench.controller.world.rows()["req-1"].replica == source.spec.id


async def test_another_destination_on_the_node_is_tried(bench):
    for name in "ab":
        await bench.add(name, devices=2)
    await bench.done(await bench.deploy(min_replicas=4, max_replicas=4))
    source = next(r for r in bench.replicas() if r.node == "a")
    await bench.request(source, "req-1")
    tried: list[str] = []

    async def fails_once(order):
        tried.append(order.target.replica)
        report = {"migration": order.id, "request": "req-1"}
        if len(tried) == 1:
            yield MigrationReport(**report, state=MigrationState.FAILED, error="no", error_reason="UNAVAILABLE")
        else:
            yield MigrationReport(**report, state=MigrationState.MOVED)

    bench.agents["a"].migrates = fails_once
    operation = await bench.migrate("b", request="req-1")
    await bench.advance(3)
    assert (await bench.done(operation)).state == "done"
    assert len(set(tried)) == 2


async def test_an_agent_that_refuses_is_asked_three_times(bench):
    source, _ = await two(bench)
    await bench.request(source, "req-1")

    async def refuses(order):
        raise Unavailable("the engine host is away")
        yield

    bench.agents["a"].migrates = refuses
    operation = await bench.migrate("b", request="req-1")
    await bench.advance(5)
    done = await bench.done(operation)
    assert (done.state, done.error_reason) == ("failed", "UNAVAILABLE")
    assert len(bench.agents["a"].orders()) == 3


async def test_one_order_at_a_time_has_a_source(bench):
    source, _ = await two(bench)
    goes_on = asyncio.Event()

    async def slowly(order):
        await goes_on.wait()
        async for report in bench.moves_all(order):
            yield report

    bench.agents["a"].migrates = slowly
    operations = []
    for number in range(2):
        await bench.request(source, f"req-{number}")
        operations.append(await bench.migrate("b", request=f"req-{number}"))
    await bench.quiet()
    assert [o.requests for o in bench.agents["a"].orders()] == [("req-0",)]
    goes_on.set()
    assert [(await bench.done(o)).state for o in operations] == ["done", "done"]


async def test_asking_twice_is_one_operation_and_elsewhere_a_conflict(bench):
    for name in "abc":
        await bench.add(name)
    await bench.done(await bench.deploy(min_replicas=3, max_replicas=3))
    source = next(r for r in bench.replicas() if r.node == "a")
    await bench.request(source, "req-1")
    first = await bench.migrate("b", request="req-1")
    assert (await bench.migrate("b", request="req-1")).id == first.id
    with pytest.raises(Conflict, match="on its way to node 'b'"):
        await bench.migrate("c", request="req-1")


async def test_nothing_is_moved_twice_over_a_restart(bench, store):
    source, target = await two(bench)
    for name in ("req-1", "req-2"):
        await bench.request(source, name)

    async def moves_one(order):
        bench.follow("req-1", target.spec.id)
        yield MigrationReport(migration=order.id, request="req-1", state=MigrationState.MOVED)
        await asyncio.Event().wait()

    bench.agents["a"].migrates = moves_one
    operation = await bench.migrate("b", replica=source.spec.id)
    await bench.until(lambda: bench.operation(operation).phase.startswith("1 of 2"))
    rows = bench.gateway.rows
    await bench.restart(store)
    bench.gateway.rows = rows
    bench.agents["a"].migrates = bench.moves_all
    for agent in bench.agents.values():
        await agent.join(bench.controller.address)
    await bench.gateway.report()
    assert (await bench.done(operation)).state == "done"
    assert [o.requests for o in bench.agents["a"].orders()] == [("req-1", "req-2"), ("req-2",)]


async def test_a_request_that_ended_while_the_controller_was_away_is_over(bench, store):
    source, _ = await two(bench)
    await bench.request(source, "req-1")
    operation = await bench.migrate("b", request="req-1")
    await bench.restart(store)
    for agent in bench.agents.values():
        await agent.join(bench.controller.address)
    await bench.gateway.report()
    await bench.quiet()
    assert bench.operation(operation).state == "running", "its gateway may have had no time to report"
    await bench.advance(6)
    done = await bench.done(operation)
    assert (done.state, done.phase) == ("done", "0 moved, 1 finished first")


# -- what is refused


async def refused(bench: Any, node: str = "b", **fields: Any) -> Exception:
    """What both the dry run and the command say."""
    request = MigrateRequest(request_id="dry", node=node, **fields)
    with pytest.raises(SllmError) as planned:
        await bench.control.plan_migration(request)
    with pytest.raises(type(planned.value)) as asked:
        await bench.migrate(node, **fields)
    assert str(planned.value) == str(asked.value)
    return asked.value


async def test_what_is_not_there(bench):
    source, _ = await two(bench)
    await bench.request(source, "req-1")
    assert isinstance(await refused(bench, request="req-9"), NotFound)
    assert isinstance(await refused(bench, replica="rep-9"), NotFound)
    assert isinstance(await refused(bench, node="z", request="req-1"), NotFound)
    assert isinstance(await refused(bench), InvalidArgument)
    assert isinstance(await refused(bench, request="req-1", replica=source.spec.id), InvalidArgument)


async def test_where_it_is_already(bench):
    source, _ = await two(bench)
    await bench.request(source, "req-1")
    assert "already" in str(await refused(bench, node="a", request="req-1"))
    assert "already" in str(await refused(bench, node="a", replica=source.spec.id))


async def test_a_request_that_is_held_runs_nowhere(bench):
    agent = await bench.add("a")
    agent.held = True
    await bench.add("b", checkpoints=())
    await bench.deploy()
    waiting = asyncio.create_task(bench.gateway.acquire())
    await bench.until(lambda: "req-1" in bench.controller.world.rows())
    assert "is held" in str(await refused(bench, request="req-1"))
    waiting.cancel()


async def test_a_cordoned_node_takes_nothing(bench):
    source, _ = await two(bench)
    await bench.request(source, "req-1")
    await bench.cordon("b")
    error = await refused(bench, request="req-1")
    assert isinstance(error, Conflict)
    assert "cordoned" in str(error)
    assert "uncordon" in error.hint


async def test_a_node_without_the_checkpoint(bench):
    a = await bench.add("a")
    await bench.add("b", checkpoints=())
    await bench.done(await bench.deploy(min_replicas=1))
    await bench.request(bench.replicas()[0], "req-1")
    error = await refused(bench, request="req-1")
    assert isinstance(error, NotFound)
    assert "sllm checkpoint add m SOURCE --node b" in error.hint
    assert a.orders() == []


async def test_a_node_without_a_free_device(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    await bench.add("b")
    await bench.done(await bench.deploy("other", min_replicas=1))
    (source,) = bench.replicas("app")
    await bench.request(source, "req-1")
    assert isinstance(await refused(bench, request="req-1"), QueueFull)


async def test_a_node_whose_devices_are_too_small(bench, tools):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    b = await bench.add("b")
    b.memory_bytes = 10
    b.changed()
    await bench.quiet()
    await bench.request(bench.replicas()[0], "req-1")
    assert isinstance(await refused(bench, request="req-1"), CapacityExceeded)


async def test_a_replica_without_room(bench):
    await bench.add("a")
    await bench.add("b")
    await bench.done(await bench.deploy(min_replicas=2, max_replicas=2, target_concurrency=1))
    source, target = sorted(bench.replicas(), key=lambda r: r.node)
    await bench.request(source, "req-1")
    for number in range(target.spec.capacity):
        await bench.request(target, f"req-full-{number}")
    error = await refused(bench, request="req-1")
    assert isinstance(error, QueueFull)
    assert "has no room" in str(error)


async def test_nothing_is_started_for_a_deployment_that_is_being_deleted(bench):
    a, b = await bench.add("a"), await bench.add("b")
    a.drains = True
    await bench.done(await bench.deploy(min_replicas=1, max_replicas=2))
    (source,) = bench.replicas()
    await bench.request(source, "req-1")
    await bench.delete()
    await bench.until(lambda: bench.replicas()[0].state is ReplicaState.DRAINING)
    error = await refused(bench, request="req-1")
    assert isinstance(error, Conflict)
    assert "is being deleted" in str(error)
    assert b.starts() == []


async def test_no_replica_beyond_the_limit_for_a_part_of_the_requests(bench):
    await bench.add("a")
    await bench.add("b")
    await bench.done(await bench.deploy(min_replicas=1, max_replicas=1))
    (source,) = bench.replicas()
    for name in ("req-1", "req-2"):
        await bench.request(source, name)
    error = await refused(bench, request="req-1")
    assert isinstance(error, Conflict)
    assert f"--replica {source.spec.id}" in error.hint


async def test_a_dry_run_says_what_would_move_and_changes_nothing(bench):
    await bench.add("a")
    b = await bench.add("b")
    await bench.done(await bench.deploy(min_replicas=1))
    (source,) = bench.replicas()
    await bench.request(source, "req-1")
    plan = await bench.control.plan_migration(MigrateRequest(request_id="", node="b", request="req-1"))
    (move,) = plan.moves
    assert (move.request, move.source_node, move.target, move.target_node) == ("req-1", "a", None, "b")
    assert plan.starts == ("b",)
    assert "started" in move.why
    await bench.quiet()
    assert b.starts() == []
    assert bench.replicas()[0].state is ReplicaState.READY


async def test_what_rounds_take_is_learnt_given_in_orders_and_shown(bench):
    source, _ = await two(bench)
    for number in range(3):
        await bench.request(source, f"req-{number}")
        await bench.done(await bench.migrate("b", request=f"req-{number}"))
    first, *_, last = bench.agents["a"].orders()
    assert (first.cost.observations, last.cost.observations) == (0, 2)
    assert last.cost.per_token_s > 0
    (row,) = (await bench.control.list_checkpoints(Empty())).checkpoints
    (known,) = row.recomputes
    assert (known.kind, known.cost.observations) == (DeviceKind.CPU, 3)
    plan = await bench.control.plan_migration(MigrateRequest(request_id="", node="a", request="req-0"))
    assert plan.moves[0].pause_s > 0
