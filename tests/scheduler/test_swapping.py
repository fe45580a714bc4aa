"""No thrash: when what is kept for one deployment makes room for another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.device import DeviceKind, DeviceState
from sllm.core.popularity import Popularity
from sllm.core.replica import ReplicaState
from sllm.core.residency import Tier
from sllm.core.snapshot import Held
from sllm.core.startup import Learnt, Level, StartTimes
from sllm.scheduler.plan import DrainReplica
from sllm.scheduler.reconcile import reconcile

NOW = 1000.0
SWAP_S = 20.0  # 10 s each: 100 bytes at 10 bytes a second, all else takes no time

KNOWN = StartTimes(**{part: Level(value=0.0, observations=9) for part in ("grant", "fork", "whole", "rest")})
LEARNT = Learnt(
    reading={("a", Tier.SSD): Level(value=0.1, observations=9)},
    starts={(digest, DeviceKind.CPU): KNOWN for digest in ("m", "n")},
)


def at_rate(rate_rps, at=NOW):
    """Known for long."""
    return Popularity(since=at - 1e6, at=at, weight=rate_rps * 300.0)


def world(make, *, resident_rps=0.5, newcomer_rps=0.1, count=1, held_s=1.0, ready_s=100.0, learnt=LEARNT, others=()):
    """One device has an idle replica of `resident`, which is kept alive; requests for `newcomer` have come."""
    device = make.device("d0", DeviceState.LEASED)
    node = make.node(
        "a", devices=[device, *(make.device(f"d{n}", DeviceState.LEASED) for n, _ in enumerate(others, 1))]
    )
    node = replace(node, report=replace(node.report, residencies=(make.residency("m"), make.residency("n"))))
    replicas = [make.replica("x", deployment="resident"), *others]
    views = [
        make.deployment("resident", needed_at=[NOW - 5.0] * len(replicas), keep_alive_s=600.0, max_replicas=2),
        make.deployment("newcomer", needed=1, digest="n"),
    ]
    snapshot = make.snapshot(
        nodes=[node],
        deployments=views,
        replicas=[replace(r, ready_at=NOW - ready_s) for r in replicas],
        learnt=learnt,
        popularity={"resident": at_rate(resident_rps), "newcomer": at_rate(newcomer_rps)},
    )
    return replace(snapshot, held={"newcomer": Held(count=count, since=NOW - held_s)})


def makes_room(snapshot, now=NOW):
    return [action.replica for action in reconcile(snapshot, now).actions if isinstance(action, DrainReplica)] != []


def test_requests_are_gathered_before_two_deployments_swap_places(make):
    # 0.5 * 0.1 * 20^2 = 20: it takes four of them, 4 * 5.
    assert [makes_room(world(make, count=count)) for count in (1, 3, 4)] == [False, False, True]


@pytest.mark.parametrize("rates", [{"resident_rps": 0.01}, {"newcomer_rps": 0.005}])
def test_a_deployment_that_is_rarely_asked_for_gives_way_at_once_and_is_given_way_at_once(make, rates):
    assert makes_room(world(make, **rates))


def test_nobody_is_held_for_longer_than_the_bound(make):
    snapshot = world(make, held_s=29.0)
    assert not makes_room(snapshot)
    assert reconcile(snapshot, NOW).wake_at == NOW + 1.0
    assert makes_room(snapshot, NOW + 1.0)


def test_the_wait_ends_when_the_resident_has_become_less_popular(make):
    # Both fade: 0.2 * 0.04 * 20^2 = 3.2 falls to 2 within 150 * ln(1.6) s, the bound is set further away.
    snapshot = world(make, resident_rps=0.2, newcomer_rps=0.04)
    snapshot = replace(snapshot, policy=replace(snapshot.policy, swap_hold_s=200.0))
    wake_at = reconcile(snapshot, NOW).wake_at
    assert wake_at == pytest.approx(NOW + 150 * 0.470, abs=0.1)
    assert not makes_room(snapshot, wake_at - 0.01)
    assert makes_room(snapshot, wake_at)


def test_a_replica_makes_no_room_before_it_has_been_loaded_for_the_least_time(make):
    snapshot = world(make, count=100, ready_s=0.4)
    assert not makes_room(snapshot)
    assert reconcile(snapshot, NOW).wake_at == pytest.approx(NOW + 0.6)
    assert makes_room(snapshot, NOW + 0.6)


def test_what_waits_is_told_why(make):
    reason = reconcile(world(make), NOW).reasons["newcomer"]
    assert reason.text == "waiting for a free device"
    assert "rep-x of resident stays loaded" in reason.detail


def test_a_deployment_with_another_replica_loses_nothing_by_the_swap(make):
    other = make.replica("y", deployment="resident", devices=("d1",), generation=2)
    assert makes_room(world(make, others=[other]))


def test_a_guess_is_no_reason_to_hold_anybody(make):
    assert makes_room(world(make, learnt=Learnt()))


def test_nothing_is_held_where_the_bound_is_zero(make):
    snapshot = world(make)
    assert makes_room(replace(snapshot, policy=replace(snapshot.policy, swap_hold_s=0.0)))


def test_what_is_still_loading_makes_no_room_however_long_others_wait(make):
    starting = make.replica("x", deployment="resident", state=ReplicaState.STARTING)
    snapshot = world(make, count=100, held_s=299.0)
    assert reconcile(replace(snapshot, replicas={"rep-x": starting}), NOW).actions == ()


def test_a_burst_starts_all_the_replicas_it_needs_at_once_over_nodes(make):
    nodes = [make.node(name, devices=["d0", "d1"]) for name in "abc"]
    view = make.deployment(needed=5, max_replicas=5, target_concurrency=2)
    plan = reconcile(make.snapshot(nodes=nodes, deployments=[view], held={"app": 10}), NOW)
    assert sorted((a.node, *a.devices) for a in plan.actions) == [
        ("a", "d0"), ("a", "d1"), ("b", "d0"), ("b", "d1"), ("c", "d0"),
    ]  # fmt: skip
