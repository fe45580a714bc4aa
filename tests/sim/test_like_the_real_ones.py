"""Parts that are simulated apart from the processes they stand for do as those do."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sllm.agent.store.queue import LoadingQueue as RealQueue
from sllm.controller.router import Router, Waiter
from sllm.core.priority import Priority
from sllm.core.request import RequestRow, RequestState
from sllm.core.route import RouteTarget
from sllm.sim.events import EventQueue
from sllm.sim.gateway import Gateway
from sllm.sim.loading import Load, LoadingQueue
from sllm.sim.replica import Replica
from sllm.sim.request import Request
from sllm.sim.spec import Arrival

ARRIVAL = Arrival(at=0.0, deployment="app", prompt_tokens=1, output_tokens=1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(Priority)),
        st.tuples(st.just("raise"), st.integers(0, 9), st.sampled_from(Priority)),
        st.tuples(st.just("remove"), st.integers(0, 9)),
    ),
    max_size=20,
)


@given(steps=STEPS)
def test_loads_take_turns_as_in_the_store_process(steps):
    real, events, order = RealQueue(), EventQueue(), []
    simulated = LoadingQueue(events, on_begun=order.append, on_done=lambda load: None)
    there, expected, names = [], [], itertools.count()
    for step in steps:
        if step[0] == "put":
            load = Load(digest=f"{next(names)}", size_bytes=1, priority=step[1], copy=None, left_s=1e9, asked_at=0.0)
            there.append(load)
            real.put(load, step[1])
            simulated.put(load)
        elif not there:
            continue
        elif step[0] == "raise":
            load = there[step[1] % len(there)]
            real.raise_to(load, step[2])
            simulated.raise_to(load, step[2])
        else:
            load = there.pop(step[1] % len(there))
            real.remove(load)
            simulated.remove(load)
        first = real.first()
        if first is not None and first not in expected:
            expected.append(first)
    assert order == expected


@given(
    capacities=st.lists(st.integers(1, 2), max_size=3),
    loads=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    waiting=st.integers(0, 12),
)
def test_held_requests_are_granted_as_the_controller_grants_them(world, capacities, loads, waiting):
    router = Router(per_deployment=100, per_gateway=100)
    gateway = Gateway(
        EventQueue(),
        [world.model("app")],
        timeout_s=100.0,
        queue_length=100,
        on_touched=lambda name: None,
        on_ended=lambda request, replica: None,
    )
    replicas = [_replica(world, number, 4 * size, loads[number]) for number, size in enumerate(capacities)]
    for replica in replicas:
        gateway.open(replica)
    known = {replica.spec.id: len(replica.running) for replica in replicas}
    for number in range(waiting):
        row = RequestRow(id=f"req-{number}", deployment="app", state=RequestState.HELD)
        router.add(Waiter(ticket=number, row=row, gateway="g", since=0.0, deadline=100.0))
        gateway.arrive(Request(number=number, arrival=ARRIVAL))
    grants = router.grant("app", [_target(replica) for replica in replicas], known)
    found = {number: replica.spec.id for replica in replicas for number in replica.running if number < 1000}
    assert found == {grant.waiter.ticket: grant.target.replica for grant in grants}
    held = router.held().get("app")
    assert (gateway.held["app"].count if gateway.held else 0) == (held.count if held else 0)


def _replica(world, number, capacity, busy):
    spec = world.spec(f"rep-{number}", capacity=capacity)
    replica = Replica(spec=spec, model=world.model("app"), node="a", priority=Priority.REQUEST, began_at=0.0)
    replica.running = {1000 + n: Request(number=1000 + n, arrival=ARRIVAL) for n in range(min(busy, capacity))}
    return replica


def _target(replica):
    return RouteTarget(
        replica=replica.spec.id,
        node="a",
        address="a:1",
        generation=1,
        revision=1,
        capacity=replica.spec.capacity,
    )
