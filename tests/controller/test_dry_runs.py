"""What deploying or scaling would do: told by the decisions that would be made, and then made."""

from __future__ import annotations

import pytest

from sllm.core.deployment import DeploymentSpec
from sllm.core.node import LoadReport
from sllm.core.residency import Tier
from sllm.errors import CapacityExceeded, NotFound
from sllm.rpc.control import DeployRequest, ScaleRequest

PHASES_S = {"queued": 0.125, "forking": 0.25, "loading": 1.5, "building": 0.5}


async def plan_deploy(bench, name="app", **spec):
    wish = DeploymentSpec(**{"name": name, "checkpoint": "m", **spec})
    return await bench.control.plan_deploy(DeployRequest(request_id="", spec=wish))


async def plan_scale(bench, name="app", **fields):
    return await bench.control.plan_scale(ScaleRequest(request_id="", name=name, **fields))


@pytest.fixture
async def taught(bench):
    """Two nodes of which something is known."""
    for name, read_s in (("a", 1.75), ("b", 8.0)):
        load = LoadReport(number=1, digest="digest-m", size_bytes=1000, tier=Tier.SSD, queue_s=0.0, read_s=read_s)
        await (await bench.add(name)).says(phases_s=PHASES_S, loads=(load,))
    await bench.done(await bench.deploy("first", min_replicas=1))
    await bench.done(await bench.delete("first"))
    return bench


async def test_what_would_be_started_is_what_is_started(taught):
    plan = await plan_deploy(taught, min_replicas=2, max_replicas=2)
    assert [(s.node, s.devices) for s in plan.starts] == [("a", ("a-d0",)), ("b", ("b-d0",))]
    assert plan.ready_s == pytest.approx(max(s.estimate.total_s for s in plan.starts)) == pytest.approx(8.625)
    assert plan.stops == ()
    assert taught.replicas() == [], "nothing was done"
    assert taught.controller.world.cluster.deployments == {}
    await taught.done(await taught.deploy(min_replicas=2, max_replicas=2))
    assert [(r.node, r.spec.devices) for r in taught.replicas()] == [(s.node, s.devices) for s in plan.starts]


async def test_what_sleeps_starts_nothing_and_says_where_its_first_request_would_go(taught):
    plan = await plan_deploy(taught)
    assert (plan.starts, plan.ready_s, plan.revision) == ((), None, 1)
    assert [(c.node, c.refused == "") for c in plan.candidates] == [("a", True), ("b", False)]
    assert plan.candidates[0].estimate.total_s == pytest.approx(sum(PHASES_S.values()))


async def test_what_has_no_device_says_what_it_would_wait_for(taught):
    plan = await plan_deploy(taught, min_replicas=3, max_replicas=3)
    assert len(plan.starts) == 2
    assert plan.waits_for.startswith("waiting for a free device")


async def test_a_new_revision_replaces_the_old_once_it_serves(taught):
    await taught.done(await taught.deploy(min_replicas=1))
    (old,) = taught.replicas()
    plan = await plan_deploy(taught, min_replicas=1, max_model_len=32)
    assert plan.revision == 2
    assert [s.node for s in plan.starts] == ["b"]
    assert [(s.replica, s.why) for s in plan.stops] == [(old.spec.id, "once revision 2 serves")]
    same = await plan_deploy(taught, min_replicas=1)
    assert (same.revision, same.starts, same.stops) == (1, (), ())


async def test_scaling_down_says_which_replicas_go_and_up_where_they_come(taught):
    await taught.done(await taught.deploy(min_replicas=1))
    (running,) = taught.replicas()
    up = await plan_scale(taught, replicas=2)
    assert ([s.node for s in up.starts], up.stops) == (["b"], ())
    down = await plan_scale(taught, replicas=0)
    assert [(s.replica, s.node, s.why) for s in down.stops] == [(running.spec.id, "a", "it is more than is asked for")]
    bounds = await plan_scale(taught, max_replicas=5)
    assert (bounds.starts, bounds.stops) == ((), ())
    assert taught.ready() == 1


async def test_what_makes_room_is_named_with_its_deployment(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    (old,) = bench.replicas()
    plan = await plan_deploy(bench, min_replicas=1, max_model_len=32)
    assert plan.starts == ()
    assert [(s.replica, s.deployment) for s in plan.stops] == [(old.spec.id, "app")]
    assert "makes room" in plan.stops[0].why
    assert plan.waits_for.startswith("waiting for a free device")


async def test_what_would_be_refused_is_refused(bench):
    await bench.add("a")
    with pytest.raises(NotFound):
        await plan_deploy(bench, checkpoint="none")
    with pytest.raises(CapacityExceeded):
        await plan_deploy(bench, devices=9)
    with pytest.raises(NotFound):
        await plan_scale(bench, "none", replicas=1)
