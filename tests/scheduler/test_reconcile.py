from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.device import DeviceState
from sllm.core.node import Cordon, NodeState
from sllm.core.replica import ReplicaState
from sllm.core.snapshot import Command, Failures, Held, Intent
from sllm.scheduler.plan import DrainReplica, RemoveDeployment, StartReplica, StopReplica
from sllm.scheduler.reconcile import reconcile

STARTING, READY, FAILED = ReplicaState.STARTING, ReplicaState.READY, ReplicaState.FAILED
LEASED = DeviceState.LEASED


def brief(plan):
    """The actions without their reasons."""
    words = {StartReplica: "start", DrainReplica: "drain", StopReplica: "stop", RemoveDeployment: "remove"}
    return [
        (words[type(a)], getattr(a, "replica", None) or getattr(a, "node", None) or a.deployment) for a in plan.actions
    ]


def leased(make, name="a", count=1):
    return make.node(name, devices=[make.device(f"d{i}", LEASED) for i in range(count)])


def test_a_held_request_starts_a_replica_where_there_is_room(make):
    plan = reconcile(
        make.snapshot(nodes=[make.node("a")], deployments=[make.deployment(needed=1)], held={"app": 1}), 0.0
    )
    assert brief(plan) == [("start", "a")]
    assert "SSD" in plan.actions[0].why


def test_a_sleeping_deployment_starts_nothing(make):
    assert reconcile(make.snapshot(nodes=[make.node("a")], deployments=[make.deployment()]), 0.0).actions == ()


def test_the_minimum_is_started_unasked(make):
    nodes = [make.node("a"), make.node("b")]
    plan = reconcile(make.snapshot(nodes=nodes, deployments=[make.deployment(min_replicas=2, max_replicas=2)]), 0.0)
    assert brief(plan) == [("start", "a"), ("start", "b")]


def test_says_what_it_waits_for(make):
    plan = reconcile(make.snapshot(deployments=[make.deployment(needed=1)]), 0.0)
    assert plan.actions == ()
    assert "'m'" in plan.reasons["app"].text


def test_the_longest_waiting_deployment_gets_the_last_device(make):
    views = [make.deployment("app", needed=1), make.deployment("bee", needed=1)]
    snapshot = make.snapshot(nodes=[make.node("a")], deployments=views)
    held = {"app": Held(count=1, since=9.0), "bee": Held(count=1, since=3.0)}
    plan = reconcile(replace(snapshot, held=held), 10.0)
    assert [a.deployment for a in plan.actions] == ["bee"]
    assert plan.reasons["app"].text == "waiting for a free device"


def test_nothing_is_started_until_nodes_known_before_a_restart_have_reported(make):
    snapshot = make.snapshot(nodes=[make.node("a")], deployments=[make.deployment(needed=1)], settled=False)
    assert reconcile(snapshot, 0.0).actions == ()


def test_an_idle_replica_is_drained_when_its_keep_alive_is_over_and_not_before(make):
    view = make.deployment(needed_at=[5.0], keep_alive_s=10.0)
    snapshot = make.snapshot(nodes=[leased(make)], deployments=[view], replicas=[make.replica("x")])
    before = reconcile(snapshot, 14.0)
    assert (before.actions, before.wake_at) == ((), 15.0)
    assert brief(reconcile(snapshot, 15.0)) == [("drain", "rep-x")]


def test_the_idlest_replica_goes_first(make):
    view = make.deployment(needed=1, needed_at=[9.0], max_replicas=2)
    replicas = [make.replica("x", devices=["d0"]), make.replica("y", devices=["d1"])]
    snapshot = make.snapshot(nodes=[leased(make, count=2)], deployments=[view], replicas=replicas, loads={"rep-y": 1})
    assert brief(reconcile(snapshot, 10.0)) == [("drain", "rep-x")]


def test_autoscaling_never_ends_a_start(make):
    replicas = [make.replica("x", state=STARTING), make.replica("y", devices=["d1"], state=None)]
    snapshot = make.snapshot(nodes=[leased(make, count=2)], deployments=[make.deployment()], replicas=replicas)
    assert reconcile(snapshot, 1000.0).actions == ()


def test_a_ready_replica_is_not_given_up_for_one_that_only_starts(make):
    view = make.deployment(needed=1, needed_at=[9.0], max_replicas=2)
    replicas = [make.replica("x"), make.replica("y", devices=["d1"], state=STARTING, generation=2)]
    snapshot = make.snapshot(nodes=[leased(make, count=2)], deployments=[view], replicas=replicas)
    assert reconcile(snapshot, 10.0).actions == ()


# -- a new revision


def test_with_a_free_device_the_new_revision_starts_while_the_old_one_serves(make):
    view = make.deployment(number=2, needed=1, needed_at=[0.0])
    snapshot = make.snapshot(nodes=[leased(make), make.node("b")], deployments=[view], replicas=[make.replica("old")])
    assert brief(reconcile(snapshot, 1.0)) == [("start", "b")]


def test_the_old_one_is_drained_when_the_new_one_is_ready(make):
    view = make.deployment(number=2, needed=1, needed_at=[0.0])
    new = make.replica("new", on="b", revision=2, state=STARTING)
    snapshot = make.snapshot(
        nodes=[leased(make), leased(make, "b")], deployments=[view], replicas=[make.replica("old"), new]
    )
    assert reconcile(snapshot, 1.0).actions == ()
    ready = make.replica("new", on="b", revision=2)
    assert brief(reconcile(replace(snapshot, replicas={**snapshot.replicas, "rep-new": ready}), 1.0)) == [
        ("drain", "rep-old")
    ]


def test_without_a_free_device_the_old_one_makes_room(make):
    view = make.deployment(number=2, needed=1, needed_at=[0.0])
    snapshot = make.snapshot(nodes=[leased(make)], deployments=[view], replicas=[make.replica("old")])
    assert brief(reconcile(snapshot, 1.0)) == [("drain", "rep-old")]


def test_the_old_one_goes_on_serving_where_its_device_would_not_help(make):
    view = make.deployment(number=2, needed=1, needed_at=[0.0], digest="elsewhere")
    snapshot = make.snapshot(nodes=[leased(make)], deployments=[view], replicas=[make.replica("old")])
    plan = reconcile(snapshot, 1.0)
    assert plan.actions == ()
    assert "waiting" in plan.reasons["app"].text


def test_as_many_old_ones_go_as_the_new_one_needs_devices(make):
    view = make.deployment(number=2, needed=1, needed_at=[0.0], devices=2, max_replicas=2)
    olds = [make.replica(f"old{i}", devices=[f"d{i}"], generation=i) for i in range(2)]
    snapshot = make.snapshot(nodes=[leased(make, count=2)], deployments=[view], replicas=olds)
    assert sorted(brief(reconcile(snapshot, 1.0))) == [("drain", "rep-old0"), ("drain", "rep-old1")]


def test_an_old_one_that_does_not_serve_yet_is_stopped_at_once(make):
    view = make.deployment(number=2, needed=1, needed_at=[0.0])
    old = make.replica("old", state=STARTING)
    snapshot = make.snapshot(nodes=[leased(make), make.node("b")], deployments=[view], replicas=[old])
    assert brief(reconcile(snapshot, 1.0)) == [("start", "b"), ("stop", "rep-old")]


def test_an_old_one_that_nobody_uses_is_not_replaced_but_ended(make):
    view = make.deployment(number=2)
    snapshot = make.snapshot(nodes=[leased(make)], deployments=[view], replicas=[make.replica("old")])
    assert brief(reconcile(snapshot, 1.0)) == [("drain", "rep-old")]


# -- deleting


def test_deleting_ends_all_replicas_then_the_record(make):
    view = make.deployment(deleting=True, min_replicas=1)
    replicas = [make.replica("x"), make.replica("y", state=STARTING, devices=["d1"])]
    snapshot = make.snapshot(nodes=[leased(make, count=2)], deployments=[view], replicas=replicas)
    assert brief(reconcile(snapshot, 0.0)) == [("drain", "rep-x"), ("stop", "rep-y")]
    gone = replace(snapshot, replicas={})
    assert brief(reconcile(gone, 0.0)) == [("remove", "app")]
    assert reconcile(replace(gone, settled=False), 0.0).actions == (), "a node may yet report one"


# -- failures


def test_a_failed_replica_is_cleaned_up_once(make):
    failed = make.replica("x", state=FAILED)
    snapshot = make.snapshot(nodes=[leased(make)], deployments=[make.deployment()], replicas=[failed])
    assert brief(reconcile(snapshot, 0.0)) == [("stop", "rep-x")]
    told = replace(failed, intent=Intent.STOP, command=Command.SENT)
    assert reconcile(replace(snapshot, replicas={"rep-x": told}), 0.0).actions == ()


def test_the_next_start_waits_for_its_time(make):
    failures = Failures(revision=1, count=1, retry_at=5.0, error="bad luck")
    view = replace(make.deployment(needed=1), failures=failures)
    snapshot = make.snapshot(nodes=[make.node("a")], deployments=[view])
    waiting = reconcile(snapshot, 4.0)
    assert (waiting.actions, waiting.wake_at) == ((), 5.0)
    assert "bad luck" in waiting.reasons["app"].text
    assert brief(reconcile(snapshot, 5.0)) == [("start", "a")]


def test_after_a_failure_one_start_is_tried_at_a_time(make):
    failures = Failures(revision=1, count=1, retry_at=0.0)
    view = replace(make.deployment(needed=2, max_replicas=2), failures=failures)
    nodes = [make.node("a"), make.node("b")]
    assert brief(reconcile(make.snapshot(nodes=nodes, deployments=[view]), 1.0)) == [("start", "a")]
    trying = make.replica("x", state=STARTING)
    assert reconcile(make.snapshot(nodes=nodes, deployments=[view], replicas=[trying]), 1.0).actions == ()


@pytest.mark.parametrize(("intent", "verb"), [(Intent.DRAIN, "drain"), (Intent.STOP, "stop")])
def test_a_command_that_was_not_accepted_is_given_again_in_time(make, intent, verb):
    due = make.replica("x", intent=intent, command=Command.DUE, retry_at=5.0)
    snapshot = make.snapshot(nodes=[leased(make)], deployments=[make.deployment()], replicas=[due])
    assert (reconcile(snapshot, 4.0).actions, reconcile(snapshot, 4.0).wake_at) == ((), 5.0)
    assert brief(reconcile(snapshot, 5.0)) == [(verb, "rep-x")]


def test_what_runs_on_a_suspect_node_is_left_alone(make):
    view = make.deployment(needed=1, needed_at=[0.0])
    nodes = [make.node("a", state=NodeState.SUSPECT), make.node("b")]
    assert reconcile(make.snapshot(nodes=nodes, deployments=[view], replicas=[make.replica("x")]), 1.0).actions == ()


def rivals(make, *, idle=("old", "new"), held="app", devices=2, loads=(), **changes):
    """Every device of one node has a replica of another deployment, unneeded since 1, 2, … seconds."""
    nodes = [leased(make, count=devices)]
    others = [
        make.deployment(name, needed_at=[float(n)], keep_alive_s=600.0, **changes) for n, name in enumerate(idle, 1)
    ]
    replicas = [make.replica(name, deployment=name, devices=[f"d{n}"]) for n, name in enumerate(idle)]
    return make.snapshot(
        nodes=nodes,
        deployments=[make.deployment("app", needed=1), *others],
        replicas=replicas,
        held={held: 1} if held else {},
        loads=dict(loads),
    )


def test_what_is_kept_alive_but_idle_makes_room_for_a_request_that_waits_the_longest_idle_first(make):
    assert brief(reconcile(rivals(make), 10.0)) == [("drain", "rep-old")]


def test_a_busy_replica_makes_no_room(make):
    plan = reconcile(rivals(make, loads={"rep-old": 1, "rep-new": 1}), 10.0)
    assert plan.actions == ()
    assert plan.reasons["app"].text == "waiting for a free device"
    assert brief(reconcile(rivals(make, loads={"rep-old": 1}), 10.0)) == [("drain", "rep-new")]


def test_a_replica_within_its_minimum_makes_no_room(make):
    assert reconcile(rivals(make, min_replicas=1), 10.0).actions == ()


def test_nothing_makes_room_for_a_minimum_that_no_request_waits_for(make):
    assert reconcile(rivals(make, held=None), 10.0).actions == ()


def test_nothing_makes_room_while_a_gateway_is_silent(make):
    assert reconcile(replace(rivals(make), loads_fresh=False), 10.0).actions == ()


def test_one_replica_makes_room_once(make):
    before = rivals(make)
    leaving = replace(before.replicas["rep-old"], intent=Intent.DRAIN, command=Command.SENT)
    assert reconcile(replace(before, replicas={**before.replicas, "rep-old": leaving}), 10.0).actions == ()


def test_no_more_than_needed_makes_room(make):
    snapshot = rivals(make, idle=("a", "b", "c"), devices=3)
    wide = make.deployment("app", needed=1, devices=2)
    plan = reconcile(replace(snapshot, deployments={**snapshot.deployments, "app": wide}), 10.0)
    assert brief(plan) == [("drain", "rep-a"), ("drain", "rep-b")]


# -- nodes that drain


def leaving(make, name="x", **fields):
    return replace(make.replica(name, on="a", **fields), leaving=True)


def draining(make, replica, *nodes, loads=None, **spec):
    node = make.node("a", devices=[make.device("d0", LEASED)], state=NodeState.DRAINING)
    deployments = [make.deployment(**spec)]
    return make.snapshot(nodes=[node, *nodes], replicas=[replica], deployments=deployments, loads=loads)


def test_an_idle_replica_on_a_node_that_drains_is_ended(make):
    assert brief(reconcile(draining(make, leaving(make)), 0.0)) == [("drain", "rep-x")]


@pytest.mark.parametrize("state", [STARTING, None])
def test_one_that_is_starting_there_is_stopped(make, state):
    assert brief(reconcile(draining(make, leaving(make, state=state)), 0.0)) == [("stop", "rep-x")]


def test_a_busy_one_is_left_alone_and_replaced_elsewhere(make):
    snapshot = draining(make, leaving(make), make.node("b"), loads={"rep-x": 1}, needed=1)
    assert brief(reconcile(snapshot, 0.0)) == [("start", "b")]


@pytest.mark.parametrize("busy", [{"running": 1}, {"waiting": 1}])
def test_what_its_engine_says_counts_though_no_gateway_reports_it(make, busy):
    replica = leaving(make)
    replica = replace(replica, status=replace(replica.status, **busy))
    assert reconcile(draining(make, replica), 0.0).actions == ()


def test_the_minimum_is_kept_elsewhere(make):
    plan = reconcile(draining(make, leaving(make), make.node("b"), min_replicas=1), 0.0)
    assert sorted(brief(plan)) == [("drain", "rep-x"), ("start", "b")]


def test_a_cordoned_device_is_not_placed_on(make):
    node = make.node("a", devices=["d0", "d1"])
    node = replace(node, cordon=Cordon(devices=frozenset({"d0"})))
    plan = reconcile(make.snapshot(nodes=[node], deployments=[make.deployment(min_replicas=2, max_replicas=2)]), 0.0)
    assert [a.devices for a in plan.actions] == [("d1",)]


# -- ends of a migration


def test_an_end_of_a_migration_is_not_surplus(make):
    nodes = [leased(make, "a"), leased(make, "b")]
    replicas = [make.replica("x", on="a"), make.replica("y", on="b", generation=2)]
    snapshot = make.snapshot(nodes=nodes, replicas=replicas, deployments=[make.deployment(needed=1)])
    assert brief(reconcile(snapshot, 0.0)) == [("drain", "rep-y")]
    assert brief(reconcile(replace(snapshot, pinned=frozenset({"rep-y"})), 0.0)) == [("drain", "rep-x")]
    assert reconcile(replace(snapshot, pinned=frozenset({"rep-x", "rep-y"})), 0.0).actions == ()


def test_an_end_of_a_migration_makes_no_room_for_others(make):
    replicas = [make.replica("x", on="a")]
    views = [make.deployment("app", needed_at=(0.0,)), make.deployment("bee", needed=1)]
    snapshot = make.snapshot(nodes=[leased(make)], replicas=replicas, deployments=views, held={"bee": 1})
    assert brief(reconcile(snapshot, 1.0)) == [("drain", "rep-x")]
    assert reconcile(replace(snapshot, pinned=frozenset({"rep-x"})), 1.0).actions == ()
