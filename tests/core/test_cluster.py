from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.cluster import ClusterState
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.node import Cordon, NodeReport, NodeState
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus
from sllm.core.snapshot import Command, DeploymentView, Intent, Policy, ReplicaView, Revision

STARTING, READY, FAILED, DRAINING = (
    ReplicaState.STARTING,
    ReplicaState.READY,
    ReplicaState.FAILED,
    ReplicaState.DRAINING,
)


def spec(name="x", **fields):
    values = {"deployment": "app", "revision": 1, "generation": 1, "checkpoint": "m", "digest": "m", "devices": ("d0",)}
    values |= {"capacity": 32, "max_model_len": 64}
    return ReplicaSpec(id=f"rep-{name}", **{**values, **fields})


def status(state=READY, **fields):
    return ReplicaStatus(spec=fields.pop("spec", spec()), state=state, **fields)


def report(*replicas, name="a", incarnation="i1", revision=1):
    return NodeReport(
        name=name,
        incarnation=incarnation,
        revision=revision,
        address="a:1",
        version="0",
        engine="fake",
        warm=True,
        replicas=replicas,
    )


def planned(**fields):
    return ReplicaView(spec=spec(), node="a", **fields)


@pytest.fixture
def state():
    """A cluster with one deployment and one node that reported nothing running."""
    wish = DeploymentSpec(name="app", checkpoint="m")
    deployment = Deployment(spec=wish, revision=1, digest="m", created_at=0, updated_at=0)
    cluster = ClusterState(Policy(suspect_s=6.0, dead_s=15.0))
    revision = Revision(deployment=deployment, max_model_len=64, size_bytes=1)
    cluster.deployments["app"] = DeploymentView(current=revision)
    cluster.observe(report(), now=0.0, wall=0.0)
    return cluster


def test_a_planned_replica_is_not_forgotten_by_a_report_older_than_its_start(state):
    state.put(planned())
    assert state.observe(report(), now=1.0, wall=1.0).gone == ()
    state.put(planned(command=Command.DONE))
    assert state.heard("a", now=1.0, wall=1.0).gone == ()
    assert "rep-x" in state.replicas


def test_a_replica_that_was_reported_and_is_not_any_more_is_gone(state):
    state.put(planned())
    state.observe(report(status()), now=1.0, wall=1.0)
    changes = state.observe(report(), now=2.0, wall=2.0)
    assert [r.spec.id for r in changes.gone] == ["rep-x"]
    assert changes.failed == ()
    assert state.of("app") == []


def test_a_stopped_replica_that_never_was_reported_is_gone_once_the_stop_was_accepted(state):
    state.put(planned(intent=Intent.STOP))
    assert state.heard("a", now=1.0, wall=1.0).gone == ()
    state.intend("rep-x", Intent.STOP, Command.DONE)
    assert [r.spec.id for r in state.heard("a", now=2.0, wall=2.0).gone] == ["rep-x"]


def test_readiness_and_failure_are_told_once(state):
    state.put(planned())
    assert state.observe(report(status(STARTING)), now=1.0, wall=1.0).ready == ()
    assert len(state.observe(report(status()), now=2.0, wall=2.0).ready) == 1
    assert state.observe(report(status()), now=3.0, wall=3.0).ready == ()
    assert len(state.observe(report(status(FAILED)), now=4.0, wall=4.0).failed) == 1
    assert state.observe(report(status(FAILED)), now=5.0, wall=5.0).failed == ()


def test_a_start_that_an_agent_lost_by_restarting_failed(state):
    state.put(planned())
    state.observe(report(status(STARTING)), now=1.0, wall=1.0)
    (lost,) = state.observe(report(incarnation="i2"), now=2.0, wall=2.0).failed
    assert "restarted" in lost.status.error


def test_a_start_accepted_by_an_agent_that_restarted_before_reporting_it_failed_too(state):
    state.put(planned(command=Command.DONE))
    assert len(state.observe(report(incarnation="i2"), now=2.0, wall=2.0).failed) == 1


def test_an_unknown_replica_of_a_known_revision_is_adopted(state):
    (adopted,) = state.observe(report(status()), now=1.0, wall=1.0).adopted
    assert adopted.ready
    assert adopted.command is Command.DONE


@pytest.mark.parametrize(
    "other",
    [{"digest": "other"}, {"revision": 2}, {"deployment": "bee"}, {"engine_args": {"seed": "1"}}, {"max_model_len": 9}],
)
def test_any_other_unknown_replica_is_ended(state, other):
    (adopted,) = state.observe(report(status(spec=spec(**other))), now=1.0, wall=1.0).adopted
    assert (adopted.intent, adopted.command) == (Intent.DRAIN, Command.DUE)


def test_an_unknown_replica_that_only_starts_is_stopped(state):
    (adopted,) = state.observe(report(status(STARTING, spec=spec(revision=2))), now=1.0, wall=1.0).adopted
    assert adopted.intent is Intent.STOP


def test_an_unknown_replica_that_is_drained_already_is_left_to_finish(state):
    (adopted,) = state.observe(report(status(DRAINING, spec=spec(revision=2))), now=1.0, wall=1.0).adopted
    assert (adopted.intent, adopted.command) == (Intent.DRAIN, Command.DONE)


def test_a_replica_that_its_node_drains_is_not_wanted_to_run(state):
    state.put(planned())
    state.observe(report(status(DRAINING)), now=1.0, wall=1.0)
    assert state.replicas["rep-x"].intent is Intent.DRAIN
    assert not state.replicas["rep-x"].live


def test_an_agent_that_restarted_is_told_again_what_it_had_accepted(state):
    state.put(planned(intent=Intent.DRAIN, command=Command.DONE))
    state.observe(report(status()), now=1.0, wall=1.0)
    assert state.replicas["rep-x"].command is Command.DONE
    state.observe(report(status(), incarnation="i2"), now=2.0, wall=2.0)
    assert state.replicas["rep-x"].command is Command.DUE


def test_silence_makes_a_node_suspect_then_dead_and_its_replicas_are_forgotten(state):
    state.observe(report(status()), now=0.0, wall=0.0)
    assert state.next_judgement_at(0.0) == 6.0
    assert state.judge(6.0) == ()
    assert state.nodes["a"].state is NodeState.SUSPECT
    assert state.of("app") != []
    assert state.judge(15.0) == ("a",)
    assert (state.nodes["a"].state, state.of("app")) == (NodeState.DEAD, [])
    assert state.judge(16.0) == ()
    assert state.next_judgement_at(16.0) is None


def test_a_heartbeat_clears_the_suspicion(state):
    state.judge(6.0)
    state.heard("a", now=7.0, wall=7.0)
    assert (state.nodes["a"].state, state.judge(12.9)) == (NodeState.READY, ())


def test_a_cordoned_node_stays_so(state):
    state.close("a", Cordon(node=True))
    state.observe(report(), now=1.0, wall=1.0)
    state.heard("a", now=2.0, wall=2.0)
    assert state.nodes["a"].state is NodeState.CORDONED


def test_a_snapshot_does_not_change_with_the_state(state):
    snapshot = state.snapshot(loads={}, held={}, settled=True, loads_fresh=True)
    state.put(planned())
    state.deployments.clear()
    assert (dict(snapshot.replicas), list(snapshot.deployments)) == ({}, ["app"])


def test_judged_state_of_a_replica(state):
    view = replace(planned(), status=status())
    assert view.state is READY
    assert replace(view, intent=Intent.DRAIN).state is DRAINING
    assert replace(view, intent=Intent.STOP).state is ReplicaState.STOPPING
    assert replace(view, intent=Intent.STOP, status=status(FAILED)).state is FAILED


def test_replicas_of_a_node_that_drains_are_leaving_and_come_back_when_it_is_opened(state):
    state.put(replace(planned(), status=status()))
    assert state.of("app")[0].ready
    state.close("a", Cordon(node=True, draining=True))
    state.observe(report(status(), status(spec=spec("y"))), now=1.0, wall=1.0)
    for replica in state.of("app"):
        assert (replica.leaving, replica.ready, replica.live, replica.serves) == (True, False, False, True)
        assert (replica.state, replica.intent) == (DRAINING, Intent.RUN)
    assert state.nodes["a"].state is NodeState.DRAINING
    state.close("a", Cordon())
    assert state.nodes["a"].state is NodeState.READY
    assert all(replica.ready for replica in state.of("app"))


def test_closing_a_silent_node_does_not_make_it_well(state):
    state.judge(6.0)
    state.close("a", Cordon(node=True))
    assert state.nodes["a"].state is NodeState.SUSPECT
    state.heard("a", now=7.0, wall=7.0)
    assert state.nodes["a"].state is NodeState.CORDONED
