"""A simulation that begins from a live cluster: what is there is there, what was measured is used, the rest is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.description import (
    ClusterDescription,
    DescribedDeployment,
    DescribedReplica,
    KnownReading,
    KnownRecompute,
    KnownStarts,
)
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.migration import RecomputeCost
from sllm.core.node import Node, NodeReport, NodeState
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus
from sllm.core.request import RequestRow, RequestState
from sllm.core.residency import Residency, ResidencyState, Tier, TierUsage
from sllm.core.snapshot import Policy
from sllm.core.startup import Level, StartTimes
from sllm.errors import InvalidArgument, NotFound, Unavailable
from sllm.sim.live import ASSUMED_TOKEN_S, WhatIf, live_cluster, open_requests
from sllm.sim.policies import POLICIES
from sllm.sim.result import result_of
from sllm.sim.simulation import Simulation
from sllm.sim.spec import Arrival

GB = 10**9
SIZE = 10 * GB


def residency(model: str, tier: Tier) -> Residency:
    state = ResidencyState.READY
    return Residency(checkpoint=model, digest=f"digest-{model}", tier=tier, state=state, size_bytes=SIZE)


def node(name: str, *, ssd=("m",), dram=(), devices=2, state=NodeState.READY, closed=()) -> Node:
    checkpoints = [Checkpoint(name=m, digest=f"digest-{m}", size_bytes=SIZE, **CHECKPOINT) for m in ssd]
    report = NodeReport(
        name=name,
        incarnation="i",
        revision=1,
        address="127.0.0.1:1",
        version="0",
        engine="fake",
        warm=True,
        devices=tuple(
            Device(id=f"GPU-{name}-{n}", kind=DeviceKind.CUDA, state=DeviceState.FREE, memory_bytes=(40 + n) * GB)
            for n in range(devices)
        ),
        tiers=(TierUsage(tier=Tier.DRAM, capacity_bytes=100 * GB, used_bytes=0),),
        residencies=(*(residency(m, Tier.SSD) for m in ssd), *(residency(m, Tier.DRAM) for m in dram)),
        checkpoints=tuple(checkpoints),
    )
    return Node(report=report, state=state, last_seen=0.0, cordoned_devices=closed)


CHECKPOINT = {"architecture": "Llama", "dtype": "float16", "tensor_count": 1, "max_model_len": 2048}


def deployment(name: str = "app", model: str = "m", *, needed=0, unneeded_s=(), **spec) -> DescribedDeployment:
    wish = DeploymentSpec(**{"name": name, "checkpoint": model, "target_concurrency": 1, "keep_alive_s": 60.0, **spec})
    made = Deployment(spec=wish, revision=3, digest=f"digest-{model}", created_at=0.0, updated_at=0.0)
    return DescribedDeployment(
        deployment=made, max_model_len=2048, size_bytes=SIZE, needed=needed, unneeded_s=unneeded_s
    )


def replica(on: str, device: int = 0, *, state=ReplicaState.READY, name="app", revision=3) -> DescribedReplica:
    spec = ReplicaSpec(
        id=f"rep-{on}-{device}",
        deployment=name,
        revision=revision,
        generation=1,
        checkpoint="m",
        digest="digest-m",
        devices=(f"GPU-{on}-{device}",),
        capacity=4,
        max_model_len=2048,
    )
    return DescribedReplica(node=on, status=ReplicaStatus(spec=spec, state=state))


def level(value: float) -> Level:
    return Level(value=value, observations=3)


LEARNT = {
    "reading": (
        KnownReading(node="a", tier=Tier.SSD, level=level(1 / (2 * GB))),
        KnownReading(node=None, tier=Tier.SSD, level=level(1 / GB)),
    ),
    "starts": (
        KnownStarts(
            digest="digest-m",
            kind=DeviceKind.CUDA,
            times=StartTimes(grant=level(0.25), fork=level(0.5), whole=level(2.0), rest=level(0.5)),
        ),
    ),
}


def told(*nodes: Node, **fields) -> ClusterDescription:
    values = {"policy": Policy(), "nodes": nodes or (node("a"), node("b")), "deployments": (deployment(),), **LEARNT}
    return ClusterDescription(**{**values, **fields})


def begun(description: ClusterDescription, arrivals=(), **what_if):
    live = live_cluster(description, WhatIf(**what_if))
    opened = open_requests(description, live.cluster, arrivals)
    simulation = Simulation(live.cluster, [*opened, *arrivals], POLICIES["ours"], seed=1)
    simulation.run()
    return live, simulation


def asked(at: float, name: str = "app", tokens: int = 10) -> Arrival:
    return Arrival(at=at, deployment=name, prompt_tokens=1, output_tokens=tokens)


def test_nodes_are_as_they_are_reported_and_measured():
    live = live_cluster(told(node("a", dram=("m",)), node("b", devices=1)), WhatIf())
    a, b = live.cluster.nodes
    assert (a.name, a.devices, a.device_memory_bytes, a.dram_bytes) == ("a", 2, 40 * GB, 100 * GB)
    assert (a.ssd_bandwidth_bps, a.in_memory) == (pytest.approx(2 * GB), ("digest-m",))
    assert (b.devices, b.ssd_bandwidth_bps, b.in_memory) == (1, pytest.approx(GB), ()), "as nodes are in the mean"


def test_a_start_takes_what_starts_were_seen_to_take():
    (latency,) = [request.waited_s for request in begun(told(node("a")), [asked(5.0)])[1].ended]
    # Granted, forked, read in 5 s since the start, and the rest of the construction.
    assert latency == pytest.approx(5.0 + 0.5)
    hot = told(node("a", dram=("m",)))
    (latency,) = [request.waited_s for request in begun(hot, [asked(5.0)])[1].ended]
    assert latency == pytest.approx(0.25 + 0.5 + 2.0), "nothing is read: all of the construction is waited for"


def test_the_first_estimate_is_made_of_what_the_cluster_has_learnt():
    _, simulation = begun(told(node("a")), [asked(5.0)])
    error = simulation.controller.estimator.error
    assert (error.count, error.guessed) == (1, 0)
    assert error.p50 == pytest.approx(0.0, abs=0.05)


def test_a_replica_that_serves_serves_from_the_first_instant():
    live, simulation = begun(told(replicas=(replica("b", 1),)), [asked(0.0), asked(1.0)])
    assert [(p.node, p.devices, p.ready) for p in live.cluster.present] == [("b", ("cuda-1",), True)]
    assert simulation.controller.starts == 0
    assert [request.waited_s for request in simulation.ended] == [0.0, 0.0]


def test_a_start_under_way_begins_anew_and_nothing_else_is_started_for_its_request():
    waiting = RequestRow(id="req-1", deployment="app", state=RequestState.HELD)
    description = told(replicas=(replica("a", state=ReplicaState.STARTING),), requests=(waiting,))
    _, simulation = begun(description)
    assert simulation.controller.starts == 0
    assert [request.waited_s for request in simulation.ended] == [pytest.approx(5.5)]


@pytest.mark.parametrize(
    "gone",
    [
        replica("a", state=ReplicaState.DRAINING),
        replica("a", state=ReplicaState.FAILED),
        replica("a", revision=2),
        replica("a", name="deleted"),
        replica("a", device=7),
        replica("elsewhere"),
    ],
)
def test_what_ends_or_cannot_be_placed_is_not_there(gone):
    assert live_cluster(told(replicas=(gone,)), WhatIf()).cluster.present == ()


def test_an_idle_replica_goes_when_its_keep_alive_is_over_counted_from_before():
    idle = told(deployments=(deployment(unneeded_s=(50.0,)),), replicas=(replica("a"),))
    _, simulation = begun(idle, [asked(9.0), asked(100.0, tokens=1)])
    assert simulation.controller.starts == 1, "it served the one after 9 s, and was gone after 60 more"
    _, simulation = begun(idle, [asked(11.0)])
    assert simulation.controller.starts == 1, "60 s after it was last needed it goes"


def test_requests_that_run_take_part_and_are_not_counted():
    running = RequestRow(
        id="req-1",
        deployment="app",
        state=RequestState.RUNNING,
        replica="rep-a-0",
        prompt_tokens=7,
        output_tokens=30,
        max_tokens=100,
        interval_s=0.25,
    )
    description = told(node("a", devices=1), replicas=(replica("a"),), requests=(running,))
    arrivals = [asked(1.0, tokens=50)]
    live, simulation = begun(description, arrivals)
    (opened,) = open_requests(description, live.cluster, arrivals)
    assert (opened.at, opened.prompt_tokens, opened.output_tokens, opened.counted) == (0.0, 37, 20, False)
    assert live.cluster.models[0].timing.token_s == 0.25, "as the one that runs"
    assert len(simulation.ended) == 2
    assert result_of(simulation, policy="ours", seed=1).requests == 1


def test_a_replica_without_keep_alive_stays_for_what_runs_on_it():
    row = RequestRow(id="req-1", deployment="app", state=RequestState.RUNNING, replica="rep-a-0")
    description = told(deployments=(deployment(keep_alive_s=0.0),), replicas=(replica("a"),), requests=(row,))
    _, simulation = begun(description, [asked(500.0)])
    assert simulation.ended[0].losses == 0
    assert simulation.ended[0].waited_s == 0.0


def test_one_more_node_has_the_same_checkpoints_and_an_empty_memory():
    live = live_cluster(told(node("a", dram=("m",))), WhatIf(added=("a", "a")))
    assert [(n.name, n.in_memory) for n in live.cluster.nodes] == [
        ("a", ("digest-m",)),
        ("a-added-1", ()),
        ("a-added-2", ()),
    ]
    assert live.cluster.models[0].nodes == ("a", "a-added-1", "a-added-2")
    assert live.cluster.known.reading[("a-added-1", Tier.SSD)].value == 1 / (2 * GB)
    # Its one device is busy: the second request starts a replica on the node that is new, as like as the first.
    requests = [asked(0.0, tokens=900), asked(9.0, tokens=900)]
    small = told(node("a", devices=1), deployments=(deployment(max_replicas=2),))
    _, simulation = begun(small, requests, added=("a",))
    assert [r.waited_s for r in simulation.ended] == [pytest.approx(5.5), pytest.approx(0.0)]
    assert simulation.controller.starts == 2


def test_a_node_that_is_lost_takes_its_replicas_along():
    row = RequestRow(id="req-1", deployment="app", state=RequestState.RUNNING, replica="rep-a-0", interval_s=1.0)
    description = told(replicas=(replica("a"),), requests=(row,))
    _, simulation = begun(description, [asked(50.0)], down=("a",))
    (lost, _) = simulation.ended
    assert lost.losses == 1
    assert lost.replica is None
    assert simulation.controller.starts == 1
    assert not simulation.nodes["a"].up


def test_cordoned_devices_and_nodes_that_are_not_ready_are_left_out_and_that_is_said():
    live = live_cluster(told(node("a", closed=("GPU-a-0",)), node("b", state=NodeState.CORDONED)), WhatIf())
    assert [(n.name, n.devices) for n in live.cluster.nodes] == [("a", 1)]
    assert "left out, with what runs there: b (cordoned)" in live.notes


def test_what_nobody_has_measured_is_assumed_and_said():
    live = live_cluster(told(reading=(), starts=()), WhatIf())
    assert [note.split(":")[0] for note in live.notes] == [
        "nothing was read on a yet",
        "nothing was read on b yet",
        "no start like those of app was seen yet",
        "no request of app runs",
    ]
    assert live.cluster.models[0].timing.token_s == ASSUMED_TOKEN_S
    assert not live_cluster(told(), WhatIf(token_s=0.5)).notes
    nowhere = told(node("a", ssd=()), deployments=(deployment(),))
    assert "no node has a copy of app's checkpoint" in live_cluster(nowhere, WhatIf(token_s=1.0)).notes[0]


def test_what_recomputing_takes_is_used():
    cost = RecomputeCost(per_token_s=0.001, fixed_s=0.05, observations=4)
    description = told(recomputes=(KnownRecompute(digest="digest-m", kind=DeviceKind.CUDA, cost=cost),))
    timing = live_cluster(description, WhatIf()).cluster.models[0].timing
    assert (timing.prefill_token_s, timing.recompute_token_s, timing.recompute_s) == (0.001, 0.001, 0.05)


@pytest.mark.parametrize(
    ("description", "what_if", "error", "named"),
    [
        (told(), WhatIf(added=("c",)), NotFound, "no ready node 'c'"),
        (told(), WhatIf(down=("c",)), NotFound, "no ready node 'c'"),
        (told(), WhatIf(down=("a", "b")), InvalidArgument, "every node is down"),
        (told(node("a", state=NodeState.DEAD)), WhatIf(), Unavailable, "no node of the cluster is ready"),
        (told(deployments=()), WhatIf(), NotFound, "no deployment"),
        (told(node("a", devices=0)), WhatIf(), Unavailable, "no usable device"),
    ],
)
def test_what_cannot_be_simulated_is_said(description, what_if, error, named):
    with pytest.raises(error, match=named):
        live_cluster(description, what_if)


def test_two_replicas_are_not_put_on_one_device():
    twice = (replica("a"), replace(replica("a"), node="a"))
    assert len(live_cluster(told(replicas=twice), WhatIf()).cluster.present) == 1
