"""How urgent a start is: a request that waits goes before what is started ahead of requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState
from sllm.core.snapshot import Intent
from sllm.scheduler.plan import RaisePriority, StartReplica
from sllm.scheduler.reconcile import reconcile

REQUEST, PREWARM = Priority.REQUEST, Priority.PREWARM
STARTING = ReplicaState.STARTING


def priorities(plan):
    return [action.priority for action in plan.actions if isinstance(action, StartReplica)]


def raised(plan):
    return [(action.replica, action.priority) for action in plan.actions if isinstance(action, RaisePriority)]


def world(make, *replicas, held=0, devices=3, **spec):
    names = [f"d{number}" for number in range(devices)]
    return make.snapshot(
        nodes=[make.node("a", devices=names)],
        replicas=replicas,
        deployments=[make.deployment(max_replicas=3, **spec)],
        held={"app": held} if held else None,
    )


@pytest.mark.parametrize(
    ("held", "spec", "expected"),
    [
        # paper §1: a cold start is what the request waits for
        (1, {"needed": 1}, [REQUEST]),
        # paper §3: the loading queue is not filled with what nobody waits for before what somebody does
        (0, {"min_replicas": 2}, [PREWARM, PREWARM]),
        (1, {"min_replicas": 2}, [REQUEST, PREWARM]),
        (0, {"needed": 1}, [PREWARM]),  # what runs needs another, but no request waits
        (5, {"needed": 2, "target_concurrency": 4}, [REQUEST, REQUEST]),
        (4, {"needed": 2, "target_concurrency": 4}, [REQUEST, PREWARM]),
    ],
)
def test_a_start_is_as_urgent_as_what_waits_for_it(make, held, spec, expected):
    assert priorities(reconcile(world(make, held=held, **spec), 0.0)) == expected


def test_what_starts_already_counts_among_what_requests_wait_for(make):
    starting = make.replica("x", state=STARTING)
    plan = reconcile(world(make, starting, held=1, needed=2, min_replicas=2), 0.0)
    assert (priorities(plan), raised(plan)) == ([PREWARM], [])


def test_a_start_ahead_of_requests_is_raised_when_one_comes_the_oldest_first_and_once(make):
    older = make.replica("older", state=STARTING, priority=PREWARM, devices=["d0"], generation=1)
    newer = make.replica("newer", state=STARTING, priority=PREWARM, devices=["d1"], generation=2)
    snapshot = world(make, newer, older, held=1, needed=1, min_replicas=2)
    plan = reconcile(snapshot, 0.0)
    assert raised(plan) == [("rep-older", REQUEST)]
    assert plan.actions[0].why == "a request waits for it"
    after = replace(snapshot, replicas={**snapshot.replicas, "rep-older": replace(older, priority=REQUEST)})
    assert reconcile(after, 0.0).actions == ()


def test_a_start_that_a_request_waits_for_already_is_enough_for_it(make):
    older = make.replica("older", state=STARTING, priority=PREWARM, devices=["d0"], generation=1)
    newer = make.replica("newer", state=STARTING, devices=["d1"], generation=2)
    assert reconcile(world(make, newer, older, held=1, needed=1, min_replicas=2), 0.0).actions == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"state": None},  # the command may not have arrived
        {"state": ReplicaState.READY},
        {"state": STARTING, "intent": Intent.STOP},
        {"state": STARTING, "revision": 1},
    ],
)
def test_only_a_start_that_is_reported_and_wanted_is_raised(make, fields):
    other = make.replica("x", **{"revision": 2, "priority": PREWARM, **fields})
    assert raised(reconcile(world(make, other, held=1, needed=1, number=2), 0.0)) == []


def test_a_raise_that_did_not_arrive_is_repeated_later(make):
    starting = make.replica("x", state=STARTING, priority=PREWARM, retry_at=5.0)
    snapshot = world(make, starting, held=1, needed=1)
    before = reconcile(snapshot, 4.0)
    assert (before.actions, before.wake_at) == ((), 5.0)
    assert raised(reconcile(snapshot, 5.0)) == [("rep-x", REQUEST)]
