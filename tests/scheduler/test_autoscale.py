from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.core.replica import ReplicaState
from sllm.core.snapshot import Intent
from sllm.scheduler.autoscale import cut, demand, kept_warm, remember, scale, surplus


@pytest.mark.parametrize(
    ("running", "held", "wanted"),
    [(0, 0, 0), (1, 0, 1), (0, 1, 1), (8, 0, 1), (8, 1, 2), (20, 5, 4)],
)
def test_demand_is_what_running_and_held_requests_need(make, running, held, wanted):
    view, replica = make.deployment(), make.replica("x")
    snapshot = make.snapshot(
        deployments=[view], replicas=[replica], loads={"rep-x": running}, held={"app": held} if held else {}
    )
    assert demand(snapshot, view, [replica]) == wanted


def test_requests_that_finish_on_a_replica_scaled_away_call_for_no_other(make):
    view, gone = make.deployment(), make.replica("x", intent=Intent.DRAIN)
    assert demand(make.snapshot(deployments=[view], loads={"rep-x": 5}), view, [gone]) == 0


def test_requests_that_finish_on_a_replaced_replica_call_for_its_successor(make):
    view, old = make.deployment(number=2), make.replica("x", intent=Intent.DRAIN, revision=1)
    assert demand(make.snapshot(deployments=[view], loads={"rep-x": 5}), view, [old]) == 1


def test_keeps_a_replica_for_the_keep_alive_after_it_was_last_needed(make):
    view = make.deployment(keep_alive_s=10.0)
    busy = remember(view, 1, 100.0)
    idle = remember(busy, 0, 103.0)
    snapshot = make.snapshot()
    assert scale(busy, snapshot, 1, 100.0).needed == 1
    kept = scale(idle, snapshot, 1, 112.9)
    assert (kept.needed, kept.kept, kept.until) == (0, 1, 113.0)
    assert scale(idle, snapshot, 1, 113.0).kept == 0


def test_each_replica_has_its_own_keep_alive(make):
    view = make.deployment(keep_alive_s=10.0, max_replicas=3)
    view = remember(remember(remember(view, 3, 0.0), 1, 5.0), 1, 9.0)
    assert [scale(view, make.snapshot(), 3, now).kept for now in (14.9, 15.0)] == [3, 1]


def test_nothing_is_scaled_down_while_a_gateway_is_overdue(make):
    view = make.deployment(max_replicas=3, keep_alive_s=0.0)
    stale = make.snapshot(loads_fresh=False)
    assert scale(view, stale, 2, 1000.0).kept == 2
    assert scale(view, make.snapshot(), 2, 1000.0).kept == 0


def test_a_lowered_maximum_holds_even_then(make):
    assert scale(make.deployment(max_replicas=1), make.snapshot(loads_fresh=False), 2, 0.0).kept == 1


def test_a_deleted_deployment_needs_nothing(make):
    view = make.deployment(deleting=True, min_replicas=1, needed=1, needed_at=[5.0])
    assert (scale(view, make.snapshot(), 1, 5.0).needed, scale(view, make.snapshot(), 1, 5.0).kept) == (0, 0)


def test_cutting_forgets_the_keep_alive_beyond(make):
    view = cut(remember(make.deployment(max_replicas=3), 3, 0.0), 1)
    assert scale(view, make.snapshot(), 3, 1.0).kept == 1


def test_an_adopted_replica_gets_a_keep_alive(make):
    view = kept_warm(make.deployment(keep_alive_s=10.0), 1, 50.0)
    assert scale(view, make.snapshot(), 1, 59.0).kept == 1
    assert scale(view, make.snapshot(), 1, 59.0).needed == 0


def test_surplus_lets_starting_replicas_go_first_then_the_idlest(make):
    replicas = [
        make.replica("busy", generation=1),
        make.replica("idle", generation=2),
        make.replica("new", generation=3, state=ReplicaState.STARTING),
    ]
    view = make.deployment()
    snapshot = make.snapshot(deployments=[view], loads={"rep-busy": 3})
    assert [r.spec.id for r in surplus(snapshot, view, replicas, 1)] == ["rep-new", "rep-idle"]


def test_surplus_leaves_what_held_requests_wait_for(make):
    replicas = [make.replica("new", state=ReplicaState.STARTING)]
    view = make.deployment()
    assert surplus(make.snapshot(deployments=[view], held={"app": 1}), view, replicas, 0) == []


@given(
    minimum=st.integers(0, 3),
    extra=st.integers(0, 3),
    history=st.lists(st.tuples(st.integers(0, 9), st.floats(0, 20)), max_size=10),
    existing=st.integers(0, 8),
    fresh=st.booleans(),
)
def test_stays_between_minimum_and_maximum(make, minimum, extra, history, existing, fresh):
    maximum = max(1, minimum + extra)
    view = make.deployment(min_replicas=minimum, max_replicas=maximum, keep_alive_s=5.0)
    now = 0.0
    for wanted, step in history:
        now += step
        view = remember(view, wanted, now)
    result = scale(view, make.snapshot(loads_fresh=fresh), existing, now)
    assert minimum <= result.needed <= result.kept <= maximum
    assert result.until is None or result.until > now
