"""Who gives way for requests that wait, where what is moved goes on, and when nothing is moved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.device import DeviceKind, DeviceState
from sllm.core.migration import Outlook
from sllm.core.residency import Tier
from sllm.core.snapshot import Held, Intent
from sllm.core.startup import Learnt, Level, StartTimes
from sllm.scheduler.plan import DrainReplica, KeepReplica, MoveRequests, StartReplica
from sllm.scheduler.reconcile import reconcile

NOW = 100.0
LONG = Outlook(pause_s=0.05, move_s=0.5, left_s=60.0)


def known(read_s=10.0):
    """A checkpoint takes `read_s` from SSD, an engine is built in 1 s."""
    level = Level(value=1.0, observations=5)
    little = Level(value=0.0, observations=5)
    times = StartTimes(grant=little, fork=little, whole=level, rest=little)
    pace = Level(value=read_s / 100, observations=5)
    return Learnt(reading_anywhere={Tier.SSD: pace}, starts_of_kind={DeviceKind.CPU: times})


def leased(make, *names):
    return [make.device(name, DeviceState.LEASED) for name in names]


def busy(make, name, *, on, of="other", devices=("d0",), digest=None, **fields):
    """A replica that has long been ready."""
    found = make.replica(name, on=on, deployment=of, devices=devices, **fields)
    return replace(found, spec=replace(found.spec, digest=digest or of), ready_at=0.0)


def world(make, nodes, replicas, *deployments, loads=None, running=None, held=None, **fields):
    """`app` waits since 90 s for a device."""
    loads = loads if loads is not None else {r.spec.id: 1 for r in replicas if r.serves}
    if running is None:
        running = {r: {f"req-{r}-{n}": LONG for n in range(count)} for r, count in loads.items()}
    values = {"learnt": known(), **fields}
    found = make.snapshot(
        nodes=nodes, replicas=replicas, deployments=deployments, loads=loads, running=running, **values
    )
    return replace(found, held={name: Held(count=1, since=10.0 + n) for n, name in enumerate(held or ["app"])})


def app(make, name="app", **fields):
    return make.deployment(name, digest=name, needed=1, needed_at=(NOW,), max_replicas=4, **fields)


def of(kind, plan):
    return [action for action in plan.actions if isinstance(action, kind)]


def near(make, **fields):
    """`app` is only on `a`, where `other` runs; `b` is free and holds `other`."""
    a = make.node("a", devices=leased(make, "d0"), holds=[("app", Tier.SSD), ("other", Tier.SSD)])
    b = make.node("b", devices=["e0"], holds=[("other", Tier.DRAM)])
    return world(make, [a, b], [busy(make, "x", on="a")], app(make), app(make, "other"), **fields)


def test_what_runs_on_the_only_node_with_the_checkpoint_moves_to_a_start_elsewhere(make):
    plan = reconcile(near(make), NOW)
    start, move = plan.actions
    assert (start.deployment, start.node, start.devices) == ("other", "b", ("e0",))
    assert start.why == "what runs on rep-x goes on there: app needs its devices"
    assert (move.replica, move.room_for, move.to) == ("rep-x", "app", ("b",))
    assert move.free_s == pytest.approx(1.0 + 0.5 + 0.1), "the start there, the move, the release"
    assert "rep-x moves to b" in move.why
    reason = plan.reasons["app"]
    assert reason.text == "waiting for devices: what runs there is moved"
    assert [(c.node, c.refused) for c in reason.candidates] == [("a", "")]


def test_a_ready_replica_with_room_takes_what_is_moved(make):
    snapshot = near(make)
    snapshot = replace(snapshot, replicas={**snapshot.replicas, "rep-y": busy(make, "y", on="b", devices=["e0"])})
    (move,) = reconcile(snapshot, NOW).actions
    assert (move.replica, move.to) == ("rep-x", ("b",))
    assert move.free_s == pytest.approx(0.5 + 0.1)


def test_a_peer_without_room_for_all_takes_nothing(make):
    snapshot = near(make)
    full = busy(make, "y", on="b", devices=["e0"])
    snapshot = replace(
        snapshot, replicas={**snapshot.replicas, "rep-y": full}, loads={"rep-x": 1, "rep-y": full.spec.capacity}
    )
    assert of(MoveRequests, reconcile(snapshot, NOW)) == []


def test_what_ends_soon_is_waited_for(make):
    soon = {"rep-x": {"req-1": replace(LONG, left_s=1.0)}}
    plan = reconcile(near(make, running=soon), NOW)
    assert plan.actions == ()
    assert "rep-x is expected to end" in plan.reasons["app"].detail


def test_a_gain_within_the_error_of_predictions_moves_nothing(make):
    """Moving takes 1.6 s; waiting 1.9 s."""
    assert reconcile(near(make, running={"rep-x": {"r": replace(LONG, left_s=1.8)}}), NOW).actions == ()


def test_an_idle_replica_is_stopped_before_a_busy_one_is_moved(make):
    a = make.node("a", devices=leased(make, "d0", "d1"), holds=[("app", Tier.SSD), ("other", Tier.SSD)])
    b = make.node("b", devices=["e0"], holds=[("other", Tier.DRAM)])
    idle = busy(make, "y", on="a", devices=["d1"], of="third")
    third = make.deployment("third", digest="third", keep_alive_s=1000.0, needed_at=(50.0,))
    snapshot = world(
        make, [a, b], [busy(make, "x", on="a"), idle], app(make), app(make, "other"), third, loads={"rep-x": 1}
    )
    (drain,) = reconcile(snapshot, NOW).actions
    assert drain == DrainReplica(replica="rep-y", why="makes room for app, revision 1", room_for="app")


def test_an_idle_replica_makes_room_where_the_checkpoint_is_in_memory_though_a_device_is_free_elsewhere(make):
    a = make.node("a", devices=leased(make, "d0"), holds=[("app", Tier.DRAM)])
    b = make.node("b", devices=["e0"], holds=[("app", Tier.SSD)])
    third = make.deployment("third", digest="third", keep_alive_s=1000.0, needed_at=(50.0,))
    snapshot = world(make, [a, b], [busy(make, "y", on="a", of="third")], app(make), third, loads={})
    (drain,) = reconcile(snapshot, NOW).actions
    assert drain.replica == "rep-y"
    quick = replace(snapshot, learnt=known(read_s=0.2))
    assert [start.node for start in of(StartReplica, reconcile(quick, NOW))] == ["b"], "where reading is no matter"


def test_two_destinations_are_two(make):
    """Both replicas on `a` are needed; `b` has one free device for what they run, so nothing is moved."""
    a = make.node("a", devices=leased(make, "d0", "d1"), holds=[("app", Tier.SSD)])
    b = make.node("b", devices=["e0"], holds=[("one", Tier.DRAM), ("two", Tier.DRAM)])
    replicas = [busy(make, "x", on="a", of="one"), busy(make, "y", on="a", of="two", devices=["d1"])]
    snapshot = world(make, [a, b], replicas, app(make, devices=2), app(make, "one"), app(make, "two"))
    assert of(MoveRequests, reconcile(snapshot, NOW)) == []
    roomy = make.node("b", devices=["e0", "e1"], holds=[("one", Tier.DRAM), ("two", Tier.DRAM)])
    plan = reconcile(replace(snapshot, nodes={"a": a, "b": roomy}), NOW)
    assert [move.replica for move in of(MoveRequests, plan)] == ["rep-x", "rep-y"]
    assert sorted(start.devices for start in of(StartReplica, plan)) == [("e0",), ("e1",)]


def test_who_waits_longest_has_the_first_choice(make):
    snapshot = near(make, held=["old", "app"])
    snapshot = replace(snapshot, deployments={**snapshot.deployments, "old": app(make, "old")})
    a = snapshot.nodes["a"]
    also = replace(a.report, residencies=(*a.report.residencies, make.residency("old")))
    snapshot = replace(snapshot, nodes={**snapshot.nodes, "a": replace(a, report=also)})
    (move,) = of(MoveRequests, reconcile(snapshot, NOW))
    assert move.room_for == "old"


def test_a_wide_replica_is_not_overtaken_by_narrow_ones(make):
    """`wide` waits for two devices, of which one is free; `app`, which came later, does not get it."""
    devices = [make.device("d0", DeviceState.LEASED), make.device("d1")]
    a = make.node("a", devices=devices, holds=[("app", Tier.SSD), ("wide", Tier.SSD)])
    soon = {"rep-x": {"req-1": replace(LONG, left_s=5.0)}}
    snapshot = world(
        make,
        [a],
        [busy(make, "x", on="a")],
        app(make),
        app(make, "other"),
        app(make, "wide", devices=2),
        held=["wide", "app"],
        running=soon,
    )
    assert reconcile(snapshot, NOW).actions == ()
    alone = replace(snapshot, held={"app": snapshot.held["app"]})
    assert [start.devices for start in of(StartReplica, reconcile(alone, NOW))] == [("d1",)]


@pytest.mark.parametrize(
    "change",
    [
        {"loads_fresh": False},
        {"pinned": frozenset({"rep-x"})},
        {"running": {"rep-x": {"r": replace(LONG, moves=3)}}},
        {"running": {}},
    ],
    ids=["a gateway is silent", "somebody moves it", "it has moved often", "nothing is known of it"],
)
def test_nothing_is_moved_if(make, change):
    assert of(MoveRequests, reconcile(replace(near(make), **change), NOW)) == []


def test_what_has_just_become_ready_or_was_just_spared_is_not_moved(make):
    snapshot = near(make)
    for fields in ({"ready_at": NOW - 0.5}, {"ready_at": None}, {"spared_until": NOW + 1}):
        changed = replace(snapshot.replicas["rep-x"], **fields)
        plan = reconcile(replace(snapshot, replicas={"rep-x": changed}), NOW)
        assert plan.actions == ()


def test_a_deployment_that_waits_itself_is_not_displaced(make):
    snapshot = near(make, held=["app", "other"])
    assert of(MoveRequests, reconcile(snapshot, NOW)) == []


def test_nothing_is_moved_where_the_operator_does_not_want_it(make):
    snapshot = near(make)
    assert reconcile(replace(snapshot, policy=replace(snapshot.policy, displace=False)), NOW).actions == ()


def displaced(make, **fields):
    """The world of `near` when the move has been decided."""
    snapshot = near(make)
    source = replace(snapshot.replicas["rep-x"], room_for="app", leaving=True)
    coming = busy(make, "y", on="b", devices=["e0"], state=None)
    return replace(snapshot, replicas={"rep-x": source, "rep-y": coming}, **fields)


def test_what_was_decided_goes_on_without_being_decided_again(make):
    plan = reconcile(displaced(make), NOW)
    assert plan.actions == ()
    assert "rep-x is being emptied" in plan.reasons["app"].detail


def test_a_replica_that_is_empty_ends(make):
    plan = reconcile(displaced(make, loads={}), NOW)
    (drain,) = plan.actions
    assert (drain.replica, drain.room_for) == ("rep-x", "app")
    assert drain.why == "nothing runs on it, and app needs its devices"


def test_a_replica_that_nobody_waits_for_any_more_stays(make):
    snapshot = displaced(make, held={})
    deployments = {**snapshot.deployments, "app": make.deployment("app", digest="app")}
    (keep,) = reconcile(replace(snapshot, deployments=deployments), NOW).actions
    assert keep == KeepReplica(replica="rep-x", why="app does not wait for its devices any more")


def test_devices_that_come_free_on_the_same_node_are_taken_and_the_displacement_is_given_up(make):
    snapshot = displaced(make)
    a = snapshot.nodes["a"]
    more = replace(a.report, devices=(*a.report.devices, make.device("d1")))
    plan = reconcile(replace(snapshot, nodes={**snapshot.nodes, "a": replace(a, report=more)}), NOW)
    (start,) = of(StartReplica, plan)
    assert (start.deployment, start.devices) == ("app", ("d1",))
    assert [keep.replica for keep in of(KeepReplica, plan)] == ["rep-x"]


# -- what the released scheduler of the paper's authors gets wrong


def test_released_code_exact_fit_misses_a_victim_wider_than_the_shortage(make):
    a = make.node("a", devices=leased(make, "d0", "d1"), holds=[("app", Tier.SSD)])
    b = make.node("b", devices=["e0", "e1"], holds=[("other", Tier.DRAM)])
    wide = busy(make, "x", on="a", devices=("d0", "d1"))
    plan = reconcile(world(make, [a, b], [wide], app(make), app(make, "other", devices=2)), NOW)
    (move,) = of(MoveRequests, plan)
    assert move.replica == "rep-x"


def test_released_code_takes_the_newcomers_width_off_the_destination(make):
    """The destination needs as many devices as the victim, not as the newcomer."""
    a = make.node("a", devices=leased(make, "d0", "d1"), holds=[("app", Tier.SSD)])
    b = make.node("b", devices=["e0"], holds=[("other", Tier.DRAM)])
    wide = busy(make, "x", on="a", devices=("d0", "d1"))
    plan = reconcile(world(make, [a, b], [wide], app(make), app(make, "other", devices=2)), NOW)
    assert plan.actions == ()


def test_released_code_moves_to_a_node_without_the_checkpoint(make):
    snapshot = near(make)
    empty = make.node("b", devices=["e0"], holds=[("app", Tier.SSD)])
    plan = reconcile(
        replace(snapshot, nodes={**snapshot.nodes, "b": replace(empty, state=snapshot.nodes["a"].state)}), NOW
    )
    assert of(MoveRequests, plan) == []


def test_released_code_blocks_all_while_one_migration_runs(make):
    """While one deployment waits for a displacement, another starts, and a third is displaced."""
    snapshot = displaced(make)
    c = make.node("c", devices=leased(make, "f0"), holds=[("late", Tier.SSD)])
    d = make.node("d", devices=["g0", "g1"], holds=[("more", Tier.DRAM), ("free", Tier.DRAM)])
    more = busy(make, "z", on="c", of="more", devices=["f0"])
    names = ["app", "late", "free"]
    snapshot = replace(
        snapshot,
        nodes={**snapshot.nodes, "c": c, "d": d},
        replicas={**snapshot.replicas, "rep-z": more},
        deployments={**snapshot.deployments, **{n: app(make, n) for n in ("late", "more", "free")}},
        loads={"rep-x": 1, "rep-z": 1},
        running={**snapshot.running, "rep-z": {"req-z": LONG}},
        held={name: Held(count=1, since=10.0 + n) for n, name in enumerate(names)},
    )
    plan = reconcile(snapshot, NOW)
    assert [move.replica for move in of(MoveRequests, plan)] == ["rep-z"]
    assert {start.deployment for start in of(StartReplica, plan)} == {"more", "free"}


def test_released_code_hands_the_node_over_though_the_migration_failed(make):
    """The source keeps its devices as long as anything runs on it, whatever became of the destination."""
    snapshot = displaced(make)
    without = replace(snapshot, replicas={"rep-x": snapshot.replicas["rep-x"]})
    plan = reconcile(without, NOW)
    assert of(DrainReplica, plan) == []
    assert [s for s in of(StartReplica, plan) if s.deployment == "app"] == []


def test_released_code_leaks_the_devices_of_a_deleted_deployment(make):
    snapshot = displaced(make)
    gone = make.deployment("other", digest="other", deleting=True)
    plan = reconcile(replace(snapshot, deployments={**snapshot.deployments, "other": gone}), NOW)
    assert {a.replica for a in plan.actions if not isinstance(a, StartReplica)} == {"rep-x", "rep-y"}
    assert snapshot.replicas["rep-x"].intent is Intent.RUN
