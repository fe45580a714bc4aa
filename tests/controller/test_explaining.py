"""Why a replica was started where it was, what it was expected to take, and what it took: told over real gRPC."""

from __future__ import annotations

import asyncio

import pytest

from sllm.controller import decisions
from sllm.core.decision import WaitsOn
from sllm.core.node import LoadReport
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState, StartPhase
from sllm.core.request import RequestState
from sllm.core.residency import Tier
from sllm.core.startup import Basis
from sllm.errors import NotFound
from sllm.rpc.control import Empty, ExplainRequest

PHASES_S = {"queued": 0.125, "forking": 0.25, "loading": 1.5, "building": 0.5}


def loads(*seconds: float, digest: str = "digest-m") -> tuple[LoadReport, ...]:
    return tuple(
        LoadReport(number=n, digest=digest, size_bytes=1000, tier=Tier.SSD, queue_s=0.0, read_s=each)
        for n, each in enumerate(seconds, 1)
    )


async def explained(bench, target="app"):
    return await bench.control.explain(ExplainRequest(target=target))


async def error(bench):
    return (await bench.control.get_status(Empty())).estimator


async def restarted(bench, times=1):
    """Start a replica, and let it go, so many times."""
    for _ in range(times):
        await bench.done(await bench.scale(replicas=1))
        await bench.done(await bench.scale(replicas=0))


@pytest.fixture
async def taught(bench):
    """Two nodes: `a` reads 1000 bytes in 1.75 s, `b` in 8 s; starts of `app` take what PHASES_S say."""
    for name, seconds in (("a", 1.75), ("b", 8.0)):
        agent = await bench.add(name)
        await agent.says(phases_s=PHASES_S, loads=loads(seconds))
    await bench.done(await bench.deploy())
    await restarted(bench)
    return bench


async def test_a_start_is_decided_by_what_was_learnt_and_foretold_right(taught):
    await restarted(taught, 2)
    told = await explained(taught)
    assert [d.node for d in told.decisions] == ["a", "a", "a"], "the newest first"
    latest, first = told.decisions[0], told.decisions[-1]
    assert first.estimate.guessed
    assert first.candidates[1].refused == "a is preferred"
    assert latest.estimate.phases_s == pytest.approx(PHASES_S)
    assert latest.phases_s == PHASES_S
    assert latest.estimate.loading.basis is Basis.MEASURED
    assert (latest.ready_at, latest.decided_at) == (taught.clock.wall(), taught.clock.wall())
    assert latest.candidates[1].refused == "8.62 s, of which 7.75 s loading from SSD"
    assert latest.state is None, "it is gone"
    found = await error(taught)
    assert (found.count, found.guessed) == (2, 1)
    assert found.p95 == pytest.approx(0.0)


async def test_the_error_is_what_was_foretold_beside_what_came(taught):
    taught.agents["a"].phases_s = {**PHASES_S, "building": 0.5 + sum(PHASES_S.values())}
    await restarted(taught)
    found = await error(taught)
    assert (found.count, found.p50) == (1, pytest.approx(0.5)), "it took twice as long"


async def test_another_node_is_taken_once_it_is_faster(taught):
    await taught.agents["a"].says(loads=loads(1.75, 20.0, 20.0, 20.0))
    await restarted(taught)
    assert (await explained(taught)).decisions[0].node == "b"


async def test_a_start_under_way_shows_its_phases_so_far(taught):
    agent = taught.agents["a"]
    agent.held = True
    request = asyncio.create_task(taught.gateway.acquire())
    await taught.until(lambda: agent.replicas)
    (replica,) = agent.replicas
    agent.progress(replica, phase=StartPhase.LOADING, phases_s={"queued": 0.1, "forking": 0.3})
    await agent.says()
    (decision,) = (await explained(taught, replica)).decisions
    assert (decision.state, decision.priority) == (ReplicaState.STARTING, Priority.REQUEST)
    assert decision.phases_s == {"queued": 0.1, "forking": 0.3}
    assert decision.ready_at is None
    agent.finish()
    await request


async def test_a_failed_start_says_why(taught):
    agent = taught.agents["a"]
    agent.breaks = ("no memory", "ENGINE_FAILED")
    await taught.scale(replicas=1)
    await taught.advance(3)
    told = await explained(taught)
    failed = next(d for d in told.decisions if d.error)
    assert (failed.node, failed.error, failed.ready_at) == ("a", "no memory", None)
    assert told.decisions[0].node == "b"
    assert next(c for c in told.decisions[0].candidates if c.node == "a").refused == "the last start there failed"


async def test_a_request_knows_when_it_was_held_and_granted(taught):
    agent = taught.agents["a"]
    agent.held = True
    request = asyncio.create_task(taught.gateway.acquire())
    await taught.until(lambda: agent.replicas)
    began = taught.clock.wall()
    (row,) = (await taught.control.list_requests(Empty())).requests
    await taught.advance(3)
    told = await explained(taught, row.id)
    assert (told.deployment, told.request.state, told.held_at) == ("app", RequestState.HELD, began)
    assert [d.replica for d in told.decisions] == list(agent.replicas), "it waits for this start"
    assert told.granted_at is None
    agent.finish()
    granted = await request
    told = await explained(taught, row.id)
    assert (told.held_at, told.granted_at) == (began, began + 3)
    assert (told.request.replica, told.request.node) == (granted.replica, "a")
    assert [d.replica for d in told.decisions] == [granted.replica]
    await taught.gateway.finish(granted)
    told = await explained(taught, row.id)
    assert (told.request, told.granted_at) == (None, began + 3), "it is over, and remembered"


async def test_a_request_that_never_waited_is_on_a_replica_all_the_same(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    await bench.request(bench.replicas()[0], "req-77")
    told = await explained(bench, "req-77")
    assert (told.request.id, told.held_at, told.granted_at) == ("req-77", None, None)
    assert [d.replica for d in told.decisions] == [bench.replicas()[0].spec.id]


async def test_a_deployment_says_what_it_waits_for_and_where_it_would_start(bench):
    await bench.add("a")
    await bench.done(await bench.deploy("other", min_replicas=1))
    await bench.deploy(min_replicas=1)
    await bench.quiet()
    told = await explained(bench)
    assert told.waits_for == "waiting for a free device (a: 0 of 1 devices are free)"
    (candidate,) = told.candidates
    assert (candidate.refused, candidate.waits_on) == ("0 of 1 devices are free", WaitsOn.DEVICES)
    assert candidate.estimate is None
    assert told.decisions == ()
    await bench.add("b")
    await bench.quiet()
    assert (await explained(bench)).waits_for == ""


async def test_a_load_under_way_is_waited_for_in_the_estimate_of_the_next(bench):
    agent = await bench.add("a", devices=3, checkpoints=("m", "n"))
    await agent.says(phases_s=PHASES_S, loads=loads(4.0))
    await bench.done(await bench.deploy(min_replicas=1))
    await bench.deploy("bee", checkpoint="n")
    agent.held = True
    alone = (await explained(bench, "bee")).candidates[0].estimate
    request = asyncio.create_task(bench.gateway.acquire("bee"))
    await bench.until(lambda: bench.replicas("bee"))
    behind = (await explained(bench)).candidates[0].estimate
    assert (alone.ahead_bytes, behind.ahead_bytes) == (0, 1000)
    assert behind.queued.seconds == pytest.approx(alone.queued.seconds + 4.0)
    beside = (await explained(bench, "bee")).candidates[0].estimate
    assert beside.queued.seconds == alone.queued.seconds, "it needs the same bytes, which are read once"
    request.cancel()


async def test_after_a_restart_it_learns_from_what_nodes_report(taught, store):
    await taught.done(await taught.scale(replicas=1))
    (running,) = taught.replicas()
    await taught.restart(store)
    for agent in taught.agents.values():
        await agent.join(taught.controller.address)
    await taught.quiet()
    (found,) = (await explained(taught)).decisions
    assert (found.replica, found.estimate, found.decided_at) == (running.spec.id, None, 0.0)
    assert found.phases_s == PHASES_S
    assert (await error(taught)).count == 0, "what it did not foretell is not judged"
    await taught.done(await taught.scale(replicas=2))
    latest = (await explained(taught)).decisions[0]
    assert latest.estimate.loading.basis is Basis.MEASURED
    assert latest.node == "b", "the only free device"
    assert latest.estimate.forking.basis is Basis.MEASURED


async def test_a_node_that_was_thought_dead_is_not_judged_twice(taught):
    await taught.done(await taught.scale(replicas=1))
    before = (await error(taught)).count
    agent = taught.agents["a"]
    agent.silent = True
    await taught.advance(20)
    agent.silent = False
    await agent.join(taught.controller.address)
    await taught.quiet()
    assert any(r.node == "a" for r in taught.replicas())
    judged_since = (await error(taught)).count - before
    assert judged_since == 1, "only what was started on b meanwhile"


async def test_the_wait_for_a_warm_process_is_part_of_the_estimate(taught):
    agent = taught.agents["a"]
    await agent.says(warm=False)
    told = await explained(taught)
    candidate = next(c for c in told.candidates if c.node == "a")
    assert candidate.estimate.warming.basis is Basis.GUESSED
    await taught.advance(4)
    await agent.says(warm=True)
    await agent.says(warm=False)
    told = await explained(taught)
    warming = next(c for c in told.candidates if c.node == "a").estimate.warming
    assert (warming.seconds, warming.basis) == (pytest.approx(4.0), Basis.MEASURED)


async def test_decisions_are_bounded_and_gone_with_their_deployment(taught, monkeypatch):
    monkeypatch.setattr(decisions, "KEPT", 2)
    await restarted(taught, 3)
    told = await explained(taught)
    assert len(told.decisions) == 2
    await taught.done(await taught.delete())
    for target in ("app", told.decisions[0].replica):
        with pytest.raises(NotFound):
            await explained(taught, target)


async def test_of_all_decisions_the_oldest_are_forgotten_first(taught, monkeypatch):
    monkeypatch.setattr(decisions, "KEPT_IN_ALL", 2)
    await taught.done(await taught.deploy("bee", min_replicas=2, max_replicas=2))
    assert len((await explained(taught, "bee")).decisions) == 2
    assert (await explained(taught)).decisions == ()
    await taught.done(await taught.delete("bee"))
    await restarted(taught)
    assert len((await explained(taught)).decisions) == 1


@pytest.mark.parametrize(
    ("target", "hint"), [("none", "sllm status"), ("rep-none", "sllm status"), ("req-none", "sllm requests")]
)
async def test_what_is_not_known_is_not_found_and_where_to_look_is_said(bench, target, hint):
    with pytest.raises(NotFound, match=target) as refused:
        await explained(bench, target)
    assert hint in refused.value.hint
