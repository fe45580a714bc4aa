"""What a simulation begins from, told over real gRPC."""

from __future__ import annotations

from sllm.core.device import DeviceKind
from sllm.core.node import LoadReport, NodeState
from sllm.core.replica import ReplicaState
from sllm.core.residency import Tier
from sllm.rpc.control import Empty
from sllm.sim.live import WhatIf, live_cluster

PHASES_S = {"queued": 0.125, "forking": 0.25, "loading": 1.5, "building": 0.5}


def load(read_s: float) -> LoadReport:
    return LoadReport(number=1, digest="digest-m", size_bytes=1000, tier=Tier.SSD, queue_s=0.0, read_s=read_s)


async def described(bench):
    return await bench.control.describe_cluster(Empty())


async def test_a_cluster_is_described_with_what_was_learnt_of_it(bench):
    for name, seconds in (("a", 2.0), ("b", 8.0)):
        await (await bench.add(name)).says(phases_s=PHASES_S, loads=(load(seconds),))
    await bench.done(await bench.deploy(min_replicas=1))
    await bench.advance(5)
    told = await described(bench)
    assert [(node.report.name, node.state) for node in told.nodes] == [("a", NodeState.READY), ("b", NodeState.READY)]
    (deployment,) = told.deployments
    assert (deployment.deployment.spec.name, deployment.needed) == ("app", 1)
    (replica,) = told.replicas
    assert (replica.status.spec.deployment, replica.status.state) == ("app", ReplicaState.READY)
    reading = {(known.node, known.tier): known.level.value for known in told.reading}
    assert reading[("a", Tier.SSD)] == 0.002
    assert reading[("b", Tier.SSD)] == 0.008
    assert (None, Tier.SSD) in reading, "what stands in for a node that has read nothing"
    (of_it,) = [known for known in told.starts if known.digest == "digest-m"]
    assert of_it.kind is DeviceKind.CPU
    assert of_it.times.fork is not None
    assert of_it.times.fork.value == 0.25


async def test_what_is_not_needed_is_told_with_for_how_long(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1, keep_alive_s=600.0))
    await bench.done(await bench.scale(min_replicas=0, max_replicas=1))
    await bench.settle()
    await bench.advance(10)
    (deployment,) = (await described(bench)).deployments
    assert deployment.needed == 0
    assert [round(seconds) for seconds in deployment.unneeded_s] == [10]


async def test_a_replica_that_is_told_to_end_is_described_as_ending(bench):
    agent = await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1, keep_alive_s=600.0))
    await bench.scale(replicas=0)
    await bench.until(lambda: agent.stops)
    assert [r.status.state for r in (await described(bench)).replicas] == [ReplicaState.DRAINING]


async def test_what_is_described_can_be_simulated(bench):
    await (await bench.add("a")).says(phases_s=PHASES_S, loads=(load(2.0),))
    await bench.done(await bench.deploy(min_replicas=1))
    live = live_cluster(await described(bench), WhatIf())
    (node,) = live.cluster.nodes
    assert (node.name, node.ssd_bandwidth_bps, node.device_kind) == ("a", 500.0, DeviceKind.CPU)
    assert [(p.deployment, p.node, p.ready) for p in live.cluster.present] == [("app", "a", True)]


async def test_a_deployment_that_goes_is_not_described(bench):
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1))
    await bench.delete()
    assert (await described(bench)).deployments == ()
