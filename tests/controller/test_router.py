from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.controller.router import Router, Waiter
from sllm.core.request import RequestRow, RequestState
from sllm.core.route import RouteTarget
from sllm.errors import QueueFull


def waiter(ticket, deployment="app", since=0.0, deadline=100.0, gateway="g"):
    return Waiter(
        ticket=ticket,
        row=RequestRow(id=f"req-{ticket}", deployment=deployment, state=RequestState.HELD),
        gateway=gateway,
        since=since,
        deadline=deadline,
    )


def target(name, capacity=2, revision=1):
    return RouteTarget(
        replica=f"rep-{name}", node="a", address="a:1", generation=1, revision=revision, capacity=capacity
    )


def made(limit=10, per_gateway=100):
    return Router(per_deployment=limit, per_gateway=per_gateway)


def queue(*tickets, limit=10):
    router = made(limit)
    for ticket in tickets:
        router.add(waiter(ticket, since=float(ticket)))
    return router


def granted(router, targets, loads=None):
    return [(g.waiter.ticket, g.target.replica) for g in router.grant("app", targets, loads or {})]


def test_first_come_first_served_to_the_least_loaded():
    router = queue(1, 2, 3)
    assert granted(router, [target("x"), target("y")], {"rep-x": 1}) == [(1, "rep-y"), (2, "rep-x"), (3, "rep-y")]
    assert router.held() == {}


def test_who_finds_no_room_stays_in_line():
    router = queue(1, 2, 3)
    assert granted(router, [target("x")]) == [(1, "rep-x"), (2, "rep-x")]
    assert (router.held()["app"].count, router.held()["app"].since) == (1, 3.0)


def test_load_counts_by_share_of_capacity():
    router = queue(1)
    targets = [target("small", capacity=2), target("large", capacity=10)]
    assert granted(router, targets, {"rep-small": 1, "rep-large": 2}) == [(1, "rep-large")]


def test_the_newest_revision_is_preferred_while_it_has_room():
    router = queue(1, 2)
    targets = [target("old"), target("new", capacity=1, revision=2)]
    assert granted(router, targets) == [(1, "rep-new"), (2, "rep-old")]


def test_a_full_queue_refuses_and_says_when_to_come_back():
    router = queue(1, 2, limit=2)
    with pytest.raises(QueueFull) as caught:
        router.add(waiter(3))
    assert caught.value.retry_after_s
    router.add(waiter(4, deployment="bee"))
    router.remove(1)
    router.add(waiter(5))


def test_one_gateway_does_not_fill_the_queues_of_all():
    router = made(per_gateway=2)
    router.add(waiter(1))
    router.add(waiter(2, deployment="bee"))
    with pytest.raises(QueueFull, match="gateway 'g'") as caught:
        router.add(waiter(3, deployment="cee"))
    assert caught.value.retry_after_s
    assert set(router.held()) == {"app", "bee"}
    router.add(waiter(4, gateway="h"))
    assert granted(router, [target("x")]) == [(1, "rep-x"), (4, "rep-x")]
    router.add(waiter(5))


def test_the_time_of_a_request_runs_out():
    router = made()
    router.add(waiter(1, deadline=5.0))
    router.add(waiter(2, deadline=9.0))
    assert router.next_deadline() == 5.0
    assert [w.ticket for w in router.expire(5.0)] == [1]
    assert router.next_deadline() == 9.0


def test_a_queue_is_emptied_in_order():
    router = queue(1, 2)
    assert [w.ticket for w in router.empty("app")] == [1, 2]
    assert (router.held(), router.next_deadline(), router.remove(1)) == ({}, None, None)


@given(
    actions=st.lists(st.one_of(st.just("add"), st.integers(0, 30), st.tuples(st.integers(0, 3), st.integers(0, 3)))),
    limit=st.integers(1, 5),
)
def test_order_bound_and_capacity_hold_whatever_happens(actions, limit):
    router, expected, number = made(limit), [], 0
    for action in actions:
        if action == "add":
            number += 1
            try:
                router.add(waiter(number))
                expected.append(number)
            except QueueFull:
                assert len(expected) == limit
        elif isinstance(action, int):
            router.remove(action)
            expected = [ticket for ticket in expected if ticket != action]
        else:
            targets = [target(str(i), capacity=c) for i, c in enumerate(action)]
            grants = router.grant("app", targets, {})
            assert [g.waiter.ticket for g in grants] == expected[: len(grants)]
            assert len(grants) == min(len(expected), sum(action))
            for t in targets:
                assert sum(g.target is t for g in grants) <= t.capacity
            expected = expected[len(grants) :]
        assert [w.ticket for w in router.waiting("app")] == expected
