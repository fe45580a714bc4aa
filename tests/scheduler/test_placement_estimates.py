"""Placement by what is learnt: the node where a replica is expected to be ready first."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.device import DeviceKind
from sllm.core.replica import ReplicaState
from sllm.core.residency import Tier
from sllm.core.snapshot import Failures
from sllm.core.startup import NOTHING_LEARNT, Basis, Learnt, Level, StartTimes
from sllm.scheduler.placement import NEAR, NEAR_S, place
from sllm.scheduler.room import Room

NAMES = "abcde"
HELD = st.sampled_from([(("m", Tier.SSD),), (("m", Tier.DRAM),)])


def level(value: float, observations: int = 5) -> Level:
    return Level(value=value, observations=observations)


def known(*, whole: float = 1.0, warming: float = 5.0, **seconds_to_read: float) -> Learnt:
    """A fork takes 0.1 s; `m` (100 bytes) is read in so many seconds, by node; of others nothing of their own is known,
    and stands in what is usual."""
    times = StartTimes(grant=level(0.0), fork=level(0.1), whole=level(whole), rest=level(whole / 2))
    return Learnt(
        reading={(node, Tier.SSD): level(seconds / 100) for node, seconds in seconds_to_read.items()},
        reading_anywhere={Tier.SSD: level(0.02)},
        starts={("m", DeviceKind.CPU): times},
        starts_of_kind={DeviceKind.CPU: times},
        warming_anywhere=level(warming),
    )


def placed(make, nodes, learnt=NOTHING_LEARNT, replicas=(), view=None):
    snapshot = make.snapshot(nodes=nodes, replicas=replicas, deployments=[view or make.deployment()], learnt=learnt)
    return place(Room(snapshot), snapshot.deployments["app"])


def test_a_fast_disk_beats_a_slow_one(make):
    found = placed(make, [make.node("a"), make.node("b")], known(a=8.0, b=3.0))
    assert found.node == "b"
    assert {c.node: c.refused for c in found.candidates} == {"a": "8.50 s, of which 7.90 s loading from SSD", "b": ""}
    assert [c.estimate.total_s for c in found.candidates] == pytest.approx([8.5, 3.5])
    assert found.estimate.loading.basis is Basis.MEASURED


def test_a_cold_process_with_the_checkpoint_in_memory_beats_a_long_read(make):
    nodes = [make.node("a", holds=[("m", Tier.DRAM)], warm=False), make.node("b")]
    assert placed(make, nodes, known(b=20.0, warming=5.0)).node == "a"
    assert placed(make, nodes, known(b=2.0, warming=5.0)).node == "b"


def test_a_queue_is_waited_for_only_if_that_is_sooner(make):
    nodes = [make.node("a", devices=("d0", "d1"), holds=[("m", Tier.SSD), ("n", Tier.SSD)]), make.node("b")]
    other = make.replica("x", deployment="other", state=ReplicaState.STARTING)
    spec = replace(other.spec, digest="n")
    other = replace(other, spec=spec, status=replace(other.status, spec=spec))
    assert placed(make, nodes, known(a=3.0, b=7.0), [other]).node == "a"
    assert placed(make, nodes, known(a=3.0, b=5.0), [other]).node == "b"


def test_where_it_is_as_fast_the_node_with_fewer_replicas_is_taken_then_the_name(make):
    nodes = [make.node(n, devices=("d0", "d1")) for n in "abc"]
    found = placed(make, nodes, known(a=2.0, b=2.04, c=2.02), [make.replica("x", on="a")])
    assert found.node == "b"
    assert {c.node: c.refused for c in found.candidates} == {
        "a": "2.50 s, of which 1.90 s loading from SSD; b is as fast, and has fewer replicas",
        "b": "",
        "c": "2.52 s, of which 1.92 s loading from SSD; b is as fast, and comes first by name",
    }


def test_where_it_is_as_fast_the_disk_is_left_to_those_that_need_it(make):
    nodes = [make.node("a", devices=("d0", "d1")), make.node("b", devices=("d0", "d1"), holds=[("m", Tier.DRAM)])]
    found = placed(make, nodes, known(a=0.05), [make.replica("x", on="b")])
    assert found.node == "b"
    assert found.candidates[0].refused.endswith("b is as fast, and has it in memory")


def test_a_node_where_it_failed_is_the_last_choice_however_fast(make):
    view = replace(make.deployment(), failures=Failures(revision=1, count=1, retry_at=0.0, nodes=frozenset("a")))
    found = placed(make, [make.node("a"), make.node("b")], known(a=1.0, b=50.0), view=view)
    assert found.node == "b"
    assert found.candidates[0].refused == "the last start there failed"


def test_one_guess_among_the_candidates_and_the_rule_decides(make):
    learnt = known(a=50.0, b=1.0)
    nodes = [make.node("a"), make.node("b"), make.node("c", warm=False)]
    assert placed(make, nodes, learnt).node == "b"
    assert placed(make, nodes, replace(learnt, warming_anywhere=None)).node == "a"


@st.composite
def clusters(draw, make):
    """Nodes that can take a replica, alike or not, with starts of `m` under way on some."""
    nodes, replicas = [], []
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True)):
        nodes.append(make.node(name, devices=("d0", "d1"), holds=draw(HELD), warm=draw(st.booleans())))
        if draw(st.booleans()):
            state = draw(st.sampled_from([ReplicaState.READY, ReplicaState.STARTING]))
            replicas.append(make.replica(name, on=name, state=state, devices=("d1",)))
    return nodes, replicas


@given(st.data())
@settings(deadline=None)
def test_with_nothing_learnt_warm_nodes_come_first_then_dram_then_the_fewest_replicas_then_the_name(make, data):
    nodes, replicas = data.draw(clusters(make))
    counts = {node.report.name: sum(r.node == node.report.name for r in replicas) for node in nodes}

    def rank(node):
        name = node.report.name
        return (not node.report.warm, -node.tier_of("m"), counts[name], name)

    assert placed(make, nodes, replicas=replicas).node == min(nodes, key=rank).report.name


@given(st.data())
@settings(deadline=None)
def test_no_node_is_estimated_to_be_faster_than_the_one_that_is_taken(make, data):
    nodes, replicas = data.draw(clusters(make))
    seconds = st.floats(0.001, 100)
    learnt = known(
        whole=data.draw(seconds),
        warming=data.draw(seconds),
        **{n: data.draw(seconds) for n in NAMES if data.draw(st.booleans())},
    )
    found = placed(make, nodes, learnt, replicas)
    totals = {c.node: c.estimate.total_s for c in found.candidates}
    assert not found.estimate.guessed
    assert totals[found.node] <= min(totals.values()) * (1 + NEAR) + NEAR_S
    assert found == placed(make, nodes, learnt, replicas), "the same snapshot gives the same placement"
