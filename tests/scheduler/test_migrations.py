"""What moves where: tables of small worlds, and what holds of every decision."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.device import DeviceState
from sllm.core.migration import Outlook
from sllm.core.node import Cordon, NodeState
from sllm.core.replica import ReplicaState
from sllm.core.request import RequestRow, RequestState
from sllm.core.residency import Tier
from sllm.core.snapshot import Intent
from sllm.scheduler.destinations import Obstacle
from sllm.scheduler.migrations import ATTEMPTS, Traffic, Wish, decide

NODES = "abc"


def row(name: str, replica: str, **fields: Any) -> RequestRow:
    values = {"deployment": "app", "state": RequestState.RUNNING, "output_tokens": 5, **fields}
    return RequestRow(id=name, replica=f"rep-{replica}", **values)


def traffic(*rows: RequestRow, **fields: Any) -> Traffic:
    return Traffic(requests={r.id: r for r in rows}, **fields)


def world(make, *replicas, nodes=NODES, **fields):
    """Nodes with one device each, and what runs on them."""
    deployments = [make.deployment("app", max_replicas=5)]
    loads = fields.pop("loads", {})
    return make.snapshot(
        nodes=[make.node(name) for name in nodes], replicas=replicas, deployments=deployments, loads=loads, **fields
    )


def one(snapshot, known, **wish):
    (decision,) = decide(snapshot, known, [Wish(operation="op-1", **wish)])
    return decision


# -- to a node


def test_a_ready_replica_with_room_gets_it(make):
    snapshot = world(make, make.replica("s", on="a"), make.replica("t", on="b"))
    decision = one(snapshot, traffic(row("r1", "s")), node="b", requests=("r1",))
    (order,) = decision.orders
    assert (order.source, order.target, order.requests) == ("rep-s", "rep-t", ("r1",))
    (move,) = decision.moves
    assert (move.source_node, move.target_node, move.move) == ("a", "b", True)
    assert "rep-t on b has room" in move.why


def test_one_that_is_starting_is_waited_for(make):
    snapshot = world(make, make.replica("s", on="a"), make.replica("t", on="b", state=ReplicaState.STARTING))
    decision = one(snapshot, traffic(row("r1", "s")), node="b", requests=("r1",))
    assert (decision.orders, decision.start) == ((), None)
    assert "starting" in decision.moves[0].why


def test_without_one_a_replica_is_started_once(make):
    snapshot = world(make, make.replica("s", on="a"))
    known = traffic(row("r1", "s"), row("r2", "s"))
    wishes = [Wish(operation=f"op-{r}", node="b", requests=(r,)) for r in ("r1", "r2")]
    first, second = decide(snapshot, known, wishes)
    assert (first.start.node, first.start.devices) == ("b", ("d0",))
    assert (second.start, second.refusals) == (None, {})


@pytest.mark.parametrize(
    ("fields", "obstacle"),
    [
        ({"state": NodeState.CORDONED}, Obstacle.NODE),
        ({"state": NodeState.DRAINING}, Obstacle.NODE),
        ({"state": NodeState.SUSPECT}, Obstacle.NODE),
        ({"state": NodeState.DEAD}, Obstacle.NODE),
        ({"holds": ()}, Obstacle.CHECKPOINT),
        ({"devices": ()}, Obstacle.DEVICES),
    ],
)
def test_what_is_in_the_way(make, fields, obstacle):
    snapshot = make.snapshot(
        nodes=[make.node("a"), make.node("b", **fields)],
        replicas=[make.replica("s", on="a")],
        deployments=[make.deployment("app", max_replicas=5)],
    )
    decision = one(snapshot, traffic(row("r1", "s")), node="b", requests=("r1",))
    assert (decision.refusals["r1"].on, decision.moves, decision.orders) == (obstacle, (), ())


def test_devices_that_are_too_small_are_told_from_taken_ones(make):
    small = make.device("d0", memory_bytes=10)
    snapshot = make.snapshot(
        nodes=[make.node("a"), make.node("b", devices=(small,))],
        replicas=[make.replica("s", on="a")],
        deployments=[make.deployment("app", max_replicas=5)],
    )
    decision = one(snapshot, traffic(row("r1", "s")), node="b", requests=("r1",))
    assert decision.refusals["r1"].on is Obstacle.MEMORY


def test_a_replaced_revision_is_not_started_any_more(make):
    snapshot = make.snapshot(
        nodes=[make.node("a"), make.node("b")],
        replicas=[make.replica("s", on="a", revision=1)],
        deployments=[make.deployment("app", number=2, max_replicas=5)],
    )
    decision = one(snapshot, traffic(row("r1", "s")), node="b", requests=("r1",))
    assert decision.refusals["r1"].on is Obstacle.REVISION


def test_a_replica_of_another_revision_is_no_destination(make):
    snapshot = world(make, make.replica("s", on="a"), make.replica("t", on="b", revision=2))
    decision = one(snapshot, traffic(row("r1", "s")), node="b", requests=("r1",))
    assert decision.orders == ()


def test_a_replica_on_a_cordoned_device_is_no_destination(make):
    snapshot = world(make, make.replica("s", on="a"), make.replica("t", on="b"))
    closed = replace(snapshot.nodes["b"], cordon=Cordon(devices=frozenset({"d0"})))
    snapshot = replace(snapshot, nodes={**snapshot.nodes, "b": closed})
    decision = one(snapshot, traffic(row("r1", "s")), node="b", requests=("r1",))
    assert decision.refusals["r1"].on is Obstacle.DEVICES


def test_what_is_on_its_way_takes_room(make):
    snapshot = world(make, make.replica("s", on="a"), make.replica("t", on="b"), loads={"rep-t": 31})
    known = traffic(row("r1", "s"), row("r2", "s"), moving={"r2": "rep-t"})
    decision = one(snapshot, known, node="b", requests=("r1",))
    assert decision.refusals["r1"].on is Obstacle.ROOM


def test_the_longest_goes_first_and_one_of_unknown_length_before_it(make):
    snapshot = world(make, make.replica("s", on="a"), make.replica("t", on="b"))
    known = traffic(
        *(row(name, "s") for name in ("r1", "r2", "r3")),
        outlooks={"r1": Outlook(left_s=1.0), "r2": Outlook(left_s=9.0)},
    )
    decision = one(snapshot, known, node="b", requests=("r1", "r2", "r3"))
    assert decision.orders[0].requests == ("r3", "r2", "r1")


def test_a_source_with_an_order_gets_no_second(make):
    snapshot = world(make, make.replica("s", on="a"), make.replica("t", on="b"))
    decision = one(snapshot, traffic(row("r1", "s"), busy=frozenset({"rep-s"})), node="b", requests=("r1",))
    assert decision.orders == ()
    assert decision.moves[0].target == "rep-t"


# -- away from a node


def test_what_is_expected_to_end_before_it_could_be_moved_stays(make):
    snapshot = world(make, make.replica("s", on="a"), make.replica("t", on="b"))
    known = traffic(
        row("short", "s"),
        row("long", "s"),
        row("unknown", "s"),
        outlooks={
            "short": Outlook(move_s=2.0, left_s=1.9),
            "long": Outlook(move_s=2.0, left_s=2.1),
            "unknown": Outlook(move_s=2.0),
        },
    )
    decision = one(snapshot, known, node="a", within_s=60.0)
    assert [(m.request, m.move) for m in decision.moves] == [("unknown", True), ("long", True), ("short", False)]
    assert decision.orders[0].requests == ("unknown", "long")


def test_what_would_not_end_in_time_is_moved_though_it_is_short(make):
    snapshot = world(make, make.replica("s", on="a"), make.replica("t", on="b"))
    known = traffic(row("r1", "s"), outlooks={"r1": Outlook(move_s=9.0, left_s=5.0)})
    assert one(snapshot, known, node="a", within_s=4.0).moves[0].move


def test_the_replica_with_the_most_room_is_chosen(make):
    replicas = [make.replica("s", on="a"), make.replica("t", on="b"), make.replica("u", on="c")]
    snapshot = world(make, *replicas, loads={"rep-t": 20, "rep-u": 2})
    assert one(snapshot, traffic(row("r1", "s")), node="a", within_s=60.0).orders[0].target == "rep-u"


def test_a_destination_that_failed_is_not_tried_again_and_three_are_enough(make):
    replicas = [make.replica("s", on="a"), make.replica("t", on="b"), make.replica("u", on="c")]
    snapshot = world(make, *replicas)
    known = traffic(row("r1", "s"))
    assert one(snapshot, known, node="a", within_s=60.0, tried={"r1": ("rep-u",)}).orders[0].target == "rep-t"
    tried = {"r1": ("rep-x",) * ATTEMPTS}
    decision = one(snapshot, known, node="a", within_s=60.0, tried=tried)
    assert (decision.orders, decision.moves[0].move) == ((), False)


def test_what_somebody_wants_elsewhere_is_not_for_a_drain_to_say(make):
    replicas = [make.replica("s", on="a"), make.replica("t", on="b"), make.replica("u", on="c")]
    snapshot = world(make, *replicas, loads={"rep-t": 20})
    drain = Wish(operation="op-1", node="a", within_s=60.0)
    asked = Wish(operation="op-2", node="b", requests=("r1",))
    first, second = decide(snapshot, traffic(row("r1", "s")), [drain, asked])
    assert first.moves == ()
    assert second.orders[0].target == "rep-t"


# -- always


@st.composite
def worlds(draw, make):
    states = [NodeState.READY] * 3 + [NodeState.CORDONED, NodeState.DRAINING, NodeState.DEAD, NodeState.SUSPECT]
    nodes, replicas, rows = [], [], []
    for name in NODES:
        devices = ["d0", "d1"]
        cordon = Cordon(devices=frozenset(draw(st.sets(st.sampled_from(devices)))))
        holds = draw(st.sampled_from([(), (("m", Tier.SSD),)]))
        node = make.node(name, devices=devices, holds=holds, state=draw(st.sampled_from(states)))
        nodes.append(replace(node, cordon=cordon))
        for device in devices[: draw(st.integers(0, 2))]:
            replica = make.replica(
                str(len(replicas)),
                on=name,
                devices=[device],
                revision=draw(st.sampled_from([2, 2, 1])),
                state=draw(st.sampled_from([None, ReplicaState.READY, ReplicaState.READY, *ReplicaState])),
                intent=draw(st.sampled_from([Intent.RUN, Intent.RUN, *Intent])),
            )
            replicas.append(replace(replica, spec=replace(replica.spec, capacity=draw(st.integers(1, 3)))))
    for replica in replicas:
        for _ in range(draw(st.integers(0, 2))):
            rows.append(row(f"r{len(rows)}", replica.spec.id.removeprefix("rep-")))
    loads = Counter(r.replica for r in rows)
    maximum = draw(st.integers(1, 9))
    deployments = [make.deployment("app", number=2, max_replicas=maximum)]
    snapshot = make.snapshot(nodes=nodes, replicas=replicas, deployments=deployments, loads=loads)
    names = [r.id for r in rows]
    ids = [r.spec.id for r in replicas]
    moving = draw(st.dictionaries(st.sampled_from(names), st.sampled_from(ids))) if names else {}
    seconds = st.one_of(st.none(), st.floats(0, 100))
    outlooks = {n: Outlook(move_s=5.0, left_s=draw(seconds)) for n in names}
    busy = frozenset(draw(st.sets(st.sampled_from(ids)))) if ids else frozenset()
    wishes = []
    for number in range(draw(st.integers(1, 3))):
        requests = draw(st.one_of(st.none(), st.lists(st.sampled_from([*names, "gone"]), max_size=4, unique=True)))
        fails = st.lists(st.sampled_from(ids), max_size=4).map(tuple) if ids else st.just(())
        tried = draw(st.dictionaries(st.sampled_from(names), fails, max_size=3)) if names else {}
        wishes.append(
            Wish(
                operation=f"op-{number}",
                node=draw(st.sampled_from(NODES)),
                requests=None if requests is None else tuple(requests),
                within_s=draw(st.floats(0, 100)),
                tried=tried,
            )
        )
    return snapshot, traffic(*rows, outlooks=outlooks, moving=moving, busy=busy), wishes


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_decision_is_safe(make, data):
    snapshot, known, wishes = data.draw(worlds(make))
    decisions = decide(snapshot, known, wishes)
    assert decisions == decide(snapshot, known, wishes), "the same values give the same answer"
    orders = [order for decision in decisions for order in decision.orders]
    ordered = Counter(request for order in orders for request in order.requests)
    assert all(count == 1 for count in ordered.values()), "a request is in one order"
    assert not set(ordered) & set(known.moving), "nor in one beside that which is under way"
    sources = Counter(order.source for order in orders)
    assert all(count == 1 for count in sources.values()), "a source has one order"
    assert not set(sources) & known.busy
    for order in orders:
        check_order(snapshot, known, order)
    check_room(snapshot, known, orders)
    assert sum(decision.start is not None for decision in decisions) <= 1
    for wish, decision in zip(wishes, decisions, strict=True):
        check_answer(snapshot, known, wish, decision)


def check_order(snapshot, known, order):
    source, target = snapshot.replicas[order.source], snapshot.replicas[order.target]
    assert source.spec.revision == target.spec.revision
    assert source.node != target.node
    assert target.ready
    node = snapshot.nodes[target.node]
    assert node.state is NodeState.READY, "never to a node that is cordoned, draining, silent or dead"
    assert node.cordon.devices.isdisjoint(target.spec.devices)
    assert all(known.requests[request].replica == order.source for request in order.requests)


def check_room(snapshot, known, orders):
    coming = Counter(known.moving.values())
    coming.update(order.target for order in orders for _ in order.requests)
    for order in orders:
        target = snapshot.replicas[order.target]
        assert snapshot.loads.get(order.target, 0) + coming[order.target] <= target.spec.capacity


def check_answer(snapshot, known, wish, decision):
    requests = [move.request for move in decision.moves]
    assert len(requests) == len(set(requests))
    assert all(move.why for move in decision.moves)
    if wish.requests is None:
        assert not decision.refusals
        assert decision.start is None
        assert all(move.source_node == wish.node for move in decision.moves)
        assert requests == sorted(requests, key=lambda r: urgency(known, r)), "the longest first, in a total order"
    else:
        assert set(requests) | set(decision.refusals) <= set(wish.requests)
        targets = {m.target for m in decision.moves if m.target and m.request not in known.moving}
        assert {snapshot.replicas[target].node for target in targets} <= {wish.node}
    if decision.start is not None:
        node = snapshot.nodes[decision.start.node]
        assert node.state is NodeState.READY
        assert node.cordon.devices.isdisjoint(decision.start.devices)
        held = {d for r in snapshot.replicas.values() if r.node == node.report.name for d in r.spec.devices}
        assert held.isdisjoint(decision.start.devices)
        free = {d.id for d in node.report.devices if d.state is DeviceState.FREE}
        assert set(decision.start.devices) <= free


def urgency(known, request):
    left_s = known.outlooks[request].left_s
    return (-left_s if left_s is not None else float("-inf"), -known.requests[request].output_tokens, request)
