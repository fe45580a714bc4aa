"""What holds of every run, whatever the cluster, the requests and the policy."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState
from sllm.errors import SllmError
from sllm.scheduler.plan import Plan, RaisePriority, StartReplica
from sllm.sim.policies import POLICIES
from sllm.sim.request import Outcome
from sllm.sim.simulation import Simulation
from sllm.sim.spec import Cluster, Failure, Timing

NODES, MODELS = "abc", "mnop"
# `make sim-soak` takes many more.
SOME = settings(
    max_examples=int(os.environ.get("SLLM_SIM_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def clusters(draw, world, *, failing):
    nodes = [
        world.node(
            name,
            devices=draw(st.integers(1, 3)),
            dram_bytes=draw(st.sampled_from([0, 15, 40])) * 10**9,
            release_s=draw(st.sampled_from([0.0, 0.5])),
        )
        for name in NODES
    ]
    models = [
        world.model(
            name,
            on=draw(st.sampled_from(["abc", "ab", "c", "a"])),
            size_bytes=draw(st.integers(1, 20)) * 10**9,
            timing=Timing(
                fork_s=0.2, build_s=0.3, token_s=0.5, prefill_token_s=0.001, recompute_token_s=0.002, recompute_s=0.1
            ),
            min_replicas=draw(st.sampled_from([0, 0, 0, 1])) if failing else 0,
            max_replicas=draw(st.integers(1, 3)),
            target_concurrency=draw(st.integers(1, 2)),
            keep_alive_s=draw(st.sampled_from([0.0, 2.0, 30.0])),
        )
        for name in MODELS
    ]
    failures = ()
    if failing:
        failures = tuple(
            Failure(node=name, at=draw(st.floats(0, 60)), for_s=draw(st.sampled_from([None, 3.0, 30.0])))
            for name in NODES
            if draw(st.booleans())
        )
    timeout_s = draw(st.sampled_from([5.0, 40.0])) if failing else 1e6
    return Cluster(
        nodes=tuple(nodes),
        models=tuple(models),
        failures=failures,
        timeout_s=timeout_s,
        queue_length=draw(st.sampled_from([3, 100])) if failing else 1000,
        load_cv=draw(st.sampled_from([0.0, 0.2])),
    )


@st.composite
def requests(draw, world):
    rows = draw(
        st.lists(st.tuples(st.floats(0, 60), st.sampled_from(MODELS), st.integers(1, 40)), min_size=1, max_size=25)
    )
    return world.arrivals(*sorted(rows))


class Watched(Simulation):
    """Checks the world after every instant."""

    def advance(self) -> bool:
        more = super().advance()
        for node in self.nodes.values():
            devices = Counter(device for r in node.replicas.values() for device in r.spec.devices)
            assert all(count == 1 for count in devices.values()), "no device is leased twice"
            assert len(devices) <= node.spec.devices
            report = node.report()
            _, dram = report.tiers
            assert dram.used_bytes <= dram.capacity_bytes, "the pool holds no more than it has room for"
            assert dram.used_bytes == sum(r.size_bytes for r in report.residencies if r.tier.name == "DRAM")
            for replica in node.replicas.values():
                assert len(replica.running) <= replica.spec.capacity
                assert not replica.running or replica.state in (ReplicaState.READY, ReplicaState.DRAINING)
        loads = Counter()
        for node in self.nodes.values():
            loads.update({r.spec.id: len(r.running) for r in node.replicas.values() if r.running})
        if not self.cluster.failures:
            assert dict(loads) == self.gateway.loads, "gateways know what runs where"
        return more


def checked(decide):
    """The policy, and a look at its plans: none uses what is not there, and the same snapshot gives the same plan."""

    def decided(snapshot, now, rng):
        state = rng.getstate()
        plan = decide(snapshot, now, rng)
        after = rng.getstate()
        rng.setstate(state)
        assert decide(snapshot, now, rng) == plan
        assert rng.getstate() == after
        held = {(r.node, device) for r in snapshot.replicas.values() for device in r.spec.devices}
        for action in plan.actions:
            if isinstance(action, StartReplica):
                view = snapshot.deployments[action.deployment]
                node = snapshot.nodes[action.node]
                assert node.tier_of(view.current.deployment.digest) is not None, "its node holds the checkpoint"
                assert held.isdisjoint((action.node, device) for device in action.devices), "its devices are free"
                held.update((action.node, device) for device in action.devices)
        return plan

    return decided


def outcome_of(simulation):
    return [(r.number, r.outcome, r.waited_s, r.served, r.losses) for r in simulation.ended]


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
@SOME
def test_every_request_ends_once_and_nothing_is_leased_twice_though_nodes_fail(world, policy, data):
    cluster, asked = data.draw(clusters(world, failing=True)), data.draw(requests(world))
    simulation = Watched(cluster, asked, checked(POLICIES[policy]), seed=1)
    simulation.run()
    assert sorted(request.number for request in simulation.ended) == list(range(len(asked)))
    for request in simulation.ended:
        assert request.outcome is not None
        assert request.waited_s >= 0
        if request.outcome is Outcome.TIMED_OUT:
            assert request.waited_s >= cluster.timeout_s - 1e-9
    assert simulation.gateway.held == {}


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
@SOME
def test_every_request_is_served_where_there_is_capacity(world, policy, data):
    cluster, asked = data.draw(clusters(world, failing=False)), data.draw(requests(world))
    simulation = Watched(cluster, asked, POLICIES[policy], seed=1)
    simulation.run()
    assert {request.outcome for request in simulation.ended} == {Outcome.SERVED}
    served_s = sum(r.arrival.output_tokens * 0.5 for r in simulation.ended)
    assert simulation.device_s() * max(m.deployment.capacity for m in cluster.models) >= served_s - 1e-6


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
@SOME
def test_the_same_seed_gives_the_same_run(world, policy, data):
    cluster, asked = data.draw(clusters(world, failing=True)), data.draw(requests(world))
    runs = [Simulation(cluster, asked, POLICIES[policy], seed=3) for _ in range(2)]
    for simulation in runs:
        simulation.run()
    assert outcome_of(runs[0]) == outcome_of(runs[1])


@given(data=st.data())
@SOME
def test_plans_that_are_left_out_would_have_changed_nothing(world, data):
    """A pass after every event, with all deployments, comes to the same: what is left out to be quick is not missed.

    But for displacement: what it gains changes with the time alone, so that who looks oftener may see it sooner.
    """
    cluster, asked = data.draw(clusters(world, failing=True)), data.draw(requests(world))
    cluster = replace(cluster, policy=replace(cluster.policy, displace=False))
    quick = Simulation(cluster, asked, POLICIES["ours"], seed=1)
    thorough = Simulation(cluster, asked, POLICIES["ours"], seed=1, thorough=True)
    quick.run()
    thorough.run()
    assert outcome_of(quick) == outcome_of(thorough)
    assert quick.device_s() == pytest.approx(thorough.device_s())
    assert quick.controller.passes <= thorough.controller.passes


def test_a_policy_that_uses_what_it_does_not_hold_is_found_out(world):
    def greedy(snapshot, now, rng):
        if snapshot.replicas:
            return POLICIES["ours"](snapshot, now, rng)
        plan = POLICIES["ours"](snapshot, now, rng)
        return type(plan)(actions=plan.actions * 2)

    with pytest.raises(ValueError, match="a cannot start m on cuda-0"):
        world.run([world.node()], [world.model(max_replicas=2)], world.arrivals((0, "m", 1)), greedy)


def test_a_policy_that_never_comes_to_rest_is_found_out(world):
    def restless(snapshot, now, rng):
        if not snapshot.replicas:
            return POLICIES["ours"](snapshot, now, rng)
        (replica,) = snapshot.replicas
        return Plan(actions=(RaisePriority(replica=replica, priority=Priority.REQUEST, why="again"),), wake_at=now)

    with pytest.raises(SllmError, match="does not come to rest"):
        world.run([world.node()], [world.model()], world.arrivals((0, "m", 1)), restless)
