"""Requests that wait get devices by moving what runs on them: the controller decides it, and carries it out."""

from __future__ import annotations

import asyncio
from typing import Any

from sllm.controller.jobs import DISPLACE, Job
from sllm.core.operation import OperationState
from sllm.core.replica import ReplicaState
from sllm.rpc.control import Empty, ExplainRequest


async def crowded(bench: Any, **fields: Any) -> tuple[Any, Any, Any]:
    """`old` runs a request on the only device of `a`, which has the only copy of `app`'s checkpoint; `b` is free."""
    a = await bench.add("a", checkpoints=("m", "x"))
    a.migrates = bench.moves_all
    await bench.done(await bench.deploy("old", checkpoint="x", min_replicas=1))
    await bench.deploy()
    b = await bench.add("b", checkpoints=("x",))
    (source,) = bench.replicas("old")
    await bench.request(source, "req-long", **fields)
    await bench.advance(3)
    return a, b, source


def displacements(bench: Any) -> list[Job]:
    jobs = bench.controller.world.jobs
    return [job for job in jobs._jobs.values() if job.operation.kind == DISPLACE]


async def test_what_runs_moves_and_what_waits_starts_in_its_place(bench):
    a, b, source = await crowded(bench)
    b.held = True
    waiting = asyncio.create_task(bench.gateway.acquire())
    await bench.until(lambda: b.starts())
    (job,) = displacements(bench)
    assert job.operation.target == source.spec.id
    assert "app is ready soonest on a" in job.operation.phase
    assert bench.replicas("old")[0].state is ReplicaState.DRAINING
    assert (await bench.table())["old"].targets == (), "it gets nothing new"
    await bench.quiet()
    assert not waiting.done()
    assert a.stops() == [], "it has its devices as long as anything runs on it"
    b.finish()
    row = await waiting
    assert a.replicas[row.replica].spec.deployment == "app"
    (moved,) = bench.replicas("old")
    assert (moved.node, bench.gateway.rows["req-long"].replica) == ("b", moved.spec.id)
    (order,) = a.orders()
    assert order.requests == ("req-long",)
    (job,) = displacements(bench)
    assert job.operation.state is OperationState.DONE
    assert job.operation.phase.startswith("1 moved, 0 finished; app is ready soonest on a")


async def test_a_displacement_is_explained(bench):
    _, b, source = await crowded(bench)
    b.held = True
    waiting = asyncio.create_task(bench.gateway.acquire())
    await bench.until(lambda: b.starts())
    told = await bench.control.explain(ExplainRequest(target="app"))
    assert told.waits_for.startswith("waiting for devices: what runs there is moved (a: ")
    assert f"{source.spec.id} is being emptied" in told.waits_for
    told = await bench.control.explain(ExplainRequest(target="old"))
    assert told.decisions[0].why == f"what runs on {source.spec.id} goes on there: app needs its devices"
    waiting.cancel()


async def test_a_replica_stays_when_nobody_waits_for_its_devices_any_more(bench):
    a, b, source = await crowded(bench)
    b.held = True
    waiting = asyncio.create_task(bench.gateway.acquire())
    await bench.until(lambda: b.starts())
    waiting.cancel()
    await bench.until(lambda: bench.controller.world.cluster.replicas[source.spec.id].ready)
    (job,) = displacements(bench)
    assert job.operation.state is OperationState.FAILED
    assert "does not wait for its devices any more" in job.operation.error
    assert a.orders() == a.stops() == []
    assert [t.replica for t in (await bench.table())["old"].targets] == [source.spec.id]


async def test_while_the_destination_fails_the_request_and_the_device_stay_where_they_are(bench):
    a, b, source = await crowded(bench)
    b.breaks = ("no memory", "ENGINE_FAILED")
    waiting = asyncio.create_task(bench.gateway.acquire(timeout_s=500))
    await bench.until(lambda: b.starts())
    await bench.quiet()
    assert bench.gateway.rows["req-long"].replica == source.spec.id
    assert a.stops() == []
    assert not waiting.done()
    b.breaks = None
    await bench.advance(3)
    row = await waiting
    assert (row.deployment, bench.replicas("old")[0].node) == ("app", "b")
    assert len(b.starts()) == 2


async def test_nothing_is_displaced_where_the_operator_does_not_want_it(bench, store):
    _, b, _ = await crowded(bench)
    bench.controller.world.cluster.policy = type(bench.controller.world.policy)(displace=False)
    waiting = asyncio.create_task(bench.gateway.acquire())
    await bench.quiet()
    assert displacements(bench) == []
    assert b.starts() == []
    waiting.cancel()
    await bench.control.get_status(Empty())
