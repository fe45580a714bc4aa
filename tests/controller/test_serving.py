"""From a held request to a replica and back to zero, over real gRPC."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from sllm.core.deployment import DeploymentState
from sllm.core.replica import ReplicaState, StartPhase
from sllm.core.request import RequestState
from sllm.errors import DeadlineExceeded, NotFound, QueueFull
from sllm.rpc.control import Empty
from sllm.rpc.routes import ReportLoadRequest, WatchRoutesRequest


async def test_a_cold_request_starts_a_replica_and_is_granted_it(bench):
    agent = await bench.add("a")
    agent.held = True
    assert (await bench.done(await bench.deploy())).state == "done"
    assert (await bench.row()).state is DeploymentState.SLEEPING
    seen = []
    request = asyncio.create_task(bench.gateway.acquire(seen=seen))
    await bench.until(lambda: agent.replicas)
    assert (await bench.row()).state is DeploymentState.STARTING
    assert (await bench.row()).held_requests == 1
    (listed,) = (await bench.control.list_requests(Empty())).requests
    assert (listed.state, listed.replica, listed.prompt_tokens) == (RequestState.HELD, None, 3), "before any report"
    (replica,) = agent.replicas
    agent.progress(replica, phase=StartPhase.LOADING, progress=0.42)
    await bench.until(lambda: any(u.phase == "loading" for u in seen))
    assert next(u.progress for u in seen if u.phase == "loading") == 0.42
    agent.finish()
    row = await request
    assert row.replica == replica
    target = seen[-1].target
    assert (target.node, target.address, target.revision) == ("a", "a:9", 1)
    assert target.generation == agent.replicas[replica].spec.generation
    assert (await bench.row()).running_requests == 1
    (listed,) = (await bench.control.list_requests(Empty())).requests
    assert (listed.state, listed.replica, listed.node) == (RequestState.RUNNING, replica, "a"), "before any report"


async def test_a_ready_replica_with_room_is_granted_at_once(bench):
    agent = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    seen = []
    await bench.gateway.acquire(seen=seen)
    assert [bool(u.target) for u in seen] == [True]
    assert len(agent.starts()) == 1


async def test_scales_to_zero_after_the_keep_alive(bench):
    agent = await bench.add("a")
    await bench.deploy(keep_alive_s=10)
    row = await bench.gateway.acquire()
    await bench.advance(20)
    assert bench.ready() == 1, "a running request keeps it"
    await bench.gateway.finish(row)
    await bench.advance(9)
    assert bench.ready() == 1
    await bench.advance(2)
    assert (bench.replicas(), agent.replicas) == ([], {})
    assert (await bench.row()).state is DeploymentState.SLEEPING
    assert agent.stops()[0].drain_s == 30.0


async def test_requests_between_two_reports_count_as_use(bench):
    await bench.add("a")
    await bench.deploy(keep_alive_s=10)
    await bench.gateway.finish(await bench.gateway.acquire())
    await bench.advance(8)
    await bench.gateway.report(app=3)
    await bench.advance(8)
    assert bench.ready() == 1


async def test_nothing_goes_to_zero_while_the_gateway_is_silent(bench):
    await bench.add("a")
    await bench.deploy(keep_alive_s=5)
    await bench.gateway.finish(await bench.gateway.acquire())
    bench.gateway_silent = True
    await bench.advance(30)
    assert bench.ready() == 1
    bench.gateway_silent = False
    await bench.advance(1)
    assert bench.replicas() == []


async def test_more_requests_than_the_target_start_another_replica(bench):
    agents = [await bench.add(name) for name in "ab"]
    await bench.deploy(max_replicas=2, target_concurrency=2)
    await asyncio.gather(*(bench.gateway.acquire() for _ in range(3)))
    await bench.until(lambda: bench.ready() == 2)
    assert all(len(agent.replicas) == 1 for agent in agents)


async def test_requests_beyond_all_room_wait_in_line(bench):
    await bench.add("a")
    await bench.deploy(target_concurrency=1)  # room for 4
    rows = [await bench.gateway.acquire() for _ in range(4)]
    await bench.gateway.report()
    fifth = asyncio.create_task(bench.gateway.acquire())
    await bench.quiet()
    assert not fifth.done()
    await bench.gateway.finish(rows[0])
    assert (await fifth).replica == rows[0].replica


async def test_a_full_queue_refuses_at_once(store, tools):
    async with tools.opened(store, queue_per_deployment=2) as bench:
        agent = await bench.add("a")
        agent.held = True
        await bench.deploy()
        held = [asyncio.create_task(bench.gateway.acquire()) for _ in range(2)]
        await bench.until(lambda: "app" in bench.controller.world.router.held())
        await bench.until(lambda: bench.controller.world.router.held()["app"].count == 2)
        with pytest.raises(QueueFull) as caught:
            await bench.gateway.acquire()
        assert caught.value.retry_after_s > 0
        agent.finish()
        await asyncio.gather(*held)


async def test_a_request_that_goes_away_is_not_held_any_more(bench):
    agent = await bench.add("a")
    agent.held = True
    await bench.deploy()
    request = asyncio.create_task(bench.gateway.acquire())
    await bench.until(lambda: agent.replicas)
    request.cancel()
    await bench.until(lambda: not bench.controller.world.router.held())
    await bench.until(lambda: not bench.controller.world.tickets)
    agent.finish()
    await bench.until(lambda: bench.ready() == 1)
    assert (await bench.row()).running_requests == 0


async def test_a_request_waits_only_as_long_as_it_said(bench):
    agent = await bench.add("a")
    agent.held = True
    await bench.deploy()
    request = asyncio.create_task(bench.gateway.acquire(timeout_s=5.0))
    await bench.until(lambda: agent.replicas)
    await bench.advance(5)
    with pytest.raises(DeadlineExceeded, match="queued"):
        await request


async def test_a_request_for_what_is_not_deployed_is_not_found(bench):
    with pytest.raises(NotFound, match="nobody/knows"):
        await bench.gateway.acquire("nobody/knows")


async def test_routes_name_ready_replicas_and_where_execution_files_are(bench):
    agent = await bench.add("a")
    await bench.add("b", checkpoints=())
    await bench.done(await bench.deploy(min_replicas=1, max_model_len=32))
    route = (await bench.table())["app"]
    assert [t.address for t in route.targets] == ["a:9"]
    assert route.sources == (agent.address,)
    assert (route.max_model_len, route.deployment.digest) == (32, "digest-m")


async def test_route_watchers_are_told_of_changes_with_growing_revisions(bench):
    await bench.add("a")
    tables = []

    async def watch():
        async for table in bench.routes.watch_routes(WatchRoutesRequest(gateway="g")):
            tables.append(table)  # noqa: PERF401

    watching = asyncio.create_task(watch())
    await bench.until(lambda: tables)
    await bench.done(await bench.deploy(min_replicas=1))
    await bench.until(lambda: tables[-1].routes and tables[-1].routes[0].targets)
    await bench.done(await bench.delete())
    await bench.until(lambda: not tables[-1].routes)
    revisions = [table.revision for table in tables]
    assert revisions == sorted(set(revisions))
    watching.cancel()


async def test_requests_are_listed_with_their_nodes(bench):
    await bench.add("a")
    await bench.deploy()
    row = await bench.gateway.acquire()
    await bench.gateway.report()
    (listed,) = (await bench.control.list_requests(Empty())).requests
    assert (listed.id, listed.node) == (row.id, "a")


async def test_status_shows_replicas_and_nodes(bench):
    agent = await bench.add("a")
    agent.held = True
    await bench.deploy(min_replicas=1)
    await bench.until(lambda: agent.replicas)
    status = await bench.control.get_status(Empty())
    (replica,) = status.replicas
    assert (replica.node, replica.status.state) == ("a", ReplicaState.STARTING)
    (node,) = status.nodes
    assert (node.report.name, node.state, node.last_seen) == ("a", "ready", bench.now + 1e9)


async def test_waiting_for_a_device_is_said(bench):
    await bench.add("a", devices=0)
    await bench.add("b", checkpoints=())
    agent = await bench.add("c")
    await bench.done(await bench.deploy("one", min_replicas=1))
    await bench.deploy("two", min_replicas=1)
    await bench.quiet()
    row = await bench.row("two")
    why = "waiting for a free device (a: 0 of 1 devices are free; c: 0 of 1 devices are free)"
    assert (row.state, row.reason) == (DeploymentState.WAITING, why)
    seen = []
    request = asyncio.create_task(bench.gateway.acquire("two", seen=seen))
    await bench.until(lambda: seen)
    assert seen[0].phase == "waiting for a free device"
    await bench.done(await bench.delete("one"))
    assert (await request).replica in agent.replicas


async def report(bench, incarnation, *rows):
    await bench.routes.report_load(ReportLoadRequest(gateway="g", incarnation=incarnation, requests=rows))


async def test_gateways_of_one_name_each_have_their_requests(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    row = await bench.gateway.acquire()
    await bench.gateway.finish(row)
    await report(bench, "one", row)
    await report(bench, "two")
    assert (await bench.row()).running_requests == 1


async def test_a_gateway_that_left_holds_nothing_up_for_long(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(keep_alive_s=10))
    row = await bench.gateway.acquire()
    request = WatchRoutesRequest(gateway="g")
    async with aclosing(bench.routes.watch_routes(request)) as watch:
        await anext(watch)
        await report(bench, "one", row)
        bench.gateway.rows.clear()
        await bench.advance(4)
        assert (await bench.row()).running_requests == 1
    await bench.advance(2)
    assert (await bench.row()).running_requests == 0
    await bench.advance(11)
    assert bench.replicas() == []


async def test_the_time_at_which_a_replica_became_ready_stays(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    bench.agents["a"].changed()
    await bench.advance(3)
    (replica,) = bench.replicas()
    assert replica.ready_at == 1000.0
