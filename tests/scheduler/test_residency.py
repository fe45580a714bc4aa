"""What is read ahead and copied before anybody asks, and what is left as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.node import NodeState
from sllm.core.popularity import Popularity
from sllm.core.replica import ReplicaState
from sllm.core.residency import ResidencyState, Tier, TierUsage
from sllm.core.snapshot import Policy
from sllm.core.startup import Learnt, Level
from sllm.scheduler.residency import decide
from sllm.scheduler.residency_plan import COPY_AGAIN_S, PREFETCH_AGAIN_S, Recent

NOW = 1000.0
SSD, DRAM = Tier.SSD, Tier.DRAM


def popular(requests):
    """So many requests lately."""
    return Popularity(since=0.0, at=NOW, weight=float(requests))


def node(make, name="a", *, dram_bytes=1000, ssd_bytes=10_000, holds=(("m", SSD),), loading=(), **fields):
    """Each checkpoint has 100 bytes."""
    view = make.node(name, holds=holds, **fields)
    used = {tier: 100 * sum(r.tier is tier for r in view.report.residencies) for tier in (SSD, DRAM)}
    used[DRAM] += 100 * len(loading)
    coming = tuple(make.residency(digest, DRAM, ResidencyState.LOADING) for digest in loading)
    report = replace(
        view.report,
        residencies=(*view.report.residencies, *coming),
        tiers=(
            TierUsage(tier=SSD, capacity_bytes=ssd_bytes, used_bytes=used[SSD]),
            TierUsage(tier=DRAM, capacity_bytes=dram_bytes, used_bytes=used[DRAM]),
        ),
        checkpoints=tuple(replace(c, source="/models/x") for c in view.report.checkpoints),
    )
    return replace(view, report=report)


def world(make, nodes, asked, *, prefetch=True, max_copies=1, measured=True, **fields):
    """`asked`: requests lately, by digest; each has a deployment of that name."""
    learnt = Learnt(reading_anywhere={SSD: Level(value=0.1, observations=5)}) if measured else Learnt()
    snapshot = make.snapshot(
        nodes=nodes,
        deployments=[make.deployment(digest, digest=digest, checkpoint=digest) for digest in asked],
        learnt=learnt,
        popularity={digest: popular(requests) for digest, requests in asked.items()},
        **fields,
    )
    return replace(snapshot, policy=Policy(prefetch=prefetch, max_copies=max_copies))


def read_ahead(snapshot, recent=None):
    plan = decide(snapshot, recent or Recent(), NOW)
    return [(p.node, p.digest, p.instead_of) for p in plan.prefetches]


def copied(snapshot, recent=None, **options):
    return [(c.node, c.digest) for c in decide(snapshot, recent or Recent(), NOW, **options).copies]


# -- into memory


def test_what_is_popular_and_would_be_read_from_ssd_is_read_ahead(make):
    assert read_ahead(world(make, [node(make)], {"m": 5})) == [("a", "m", ())]


def test_what_was_asked_for_once_is_not_read_ahead(make):
    assert read_ahead(world(make, [node(make)], {"m": 1})) == []


def test_what_is_in_memory_or_on_its_way_is_left_alone(make):
    assert read_ahead(world(make, [node(make, holds=[("m", DRAM)])], {"m": 5})) == []
    assert read_ahead(world(make, [node(make, loading=["m"])], {"m": 5})) == []


def test_it_is_read_where_the_next_start_would_be_made(make):
    leased = node(make, "a", devices=(), holds=[("m", DRAM)])
    assert read_ahead(world(make, [leased, node(make, "b")], {"m": 5})) == [("b", "m", ())]


def test_while_no_device_is_free_it_is_read_where_most_memory_is_and_once(make):
    def busy(name, **fields):
        return make.replica(name, on=name, deployment="other", **fields)

    nodes = [node(make, "a", dram_bytes=300), node(make, "b", dram_bytes=500)]
    replicas = [busy("a"), busy("b")]
    assert read_ahead(world(make, nodes, {"m": 5}, replicas=replicas)) == [("b", "m", ())]
    nodes[0] = node(make, "a", dram_bytes=300, holds=[("m", DRAM)])
    assert read_ahead(world(make, nodes, {"m": 5}, replicas=replicas)) == []


def test_a_node_reads_ahead_one_at_a_time_the_most_popular_first(make):
    nodes = [node(make, holds=[("m", SSD), ("n", SSD)])]
    assert read_ahead(world(make, nodes, {"m": 3, "n": 9})) == [("a", "n", ())]
    assert read_ahead(world(make, [node(make, holds=[("m", SSD), ("n", SSD)], loading=["n"])], {"m": 3, "n": 9})) == []


def test_only_what_is_worth_half_as_much_gives_its_room(make):
    full = [node(make, holds=[("m", SSD), ("n", DRAM), ("o", DRAM)], dram_bytes=200)]
    assert read_ahead(world(make, full, {"m": 10, "n": 5, "o": 30})) == [("a", "m", ("n",))]
    assert read_ahead(world(make, full, {"m": 10, "n": 6, "o": 30})) == []


def test_two_that_are_about_as_popular_do_not_push_each_other_out(make):
    for inside, outside in (("m", "n"), ("n", "m")):
        full = [node(make, holds=[(outside, SSD), (inside, DRAM)], dram_bytes=100)]
        assert read_ahead(world(make, full, {"m": 10, "n": 15})) == []


def test_what_replicas_need_in_memory_is_not_given_away(make):
    full = [node(make, holds=[("m", SSD), ("n", DRAM)], dram_bytes=100, devices=("d0", "d1"))]
    serving = make.replica("x", deployment="n", devices=("d1",))
    serving = replace(serving, spec=replace(serving.spec, digest="n"))
    assert read_ahead(world(make, full, {"m": 50, "n": 3}))[0][2] == ("n",)
    assert read_ahead(world(make, full, {"m": 50, "n": 3}, replicas=[serving])) == []


def test_what_does_not_fit_is_not_read(make):
    assert read_ahead(world(make, [node(make, dram_bytes=99)], {"m": 50})) == []


def test_what_is_starting_or_waited_for_is_read_by_its_own_start(make):
    nodes = [node(make, devices=("d0", "d1"))]
    starting = make.replica("x", deployment="m", state=ReplicaState.STARTING, devices=("d1",))
    assert read_ahead(world(make, nodes, {"m": 5}, replicas=[starting])) == []
    assert read_ahead(world(make, nodes, {"m": 5}, held={"m": 1})) == []


def test_a_deployment_that_has_all_its_replicas_needs_no_more_memory(make):
    nodes = [node(make, devices=("d0", "d1"))]
    assert read_ahead(world(make, nodes, {"m": 5}, replicas=[make.replica("x", deployment="m", devices=("d1",))])) == []


def test_what_came_to_nothing_is_not_asked_for_again_at_once(make):
    snapshot, recent = world(make, [node(make)], {"m": 50}), Recent()
    recent.note(decide(snapshot, recent, NOW), NOW)
    assert decide(snapshot, recent, NOW + PREFETCH_AGAIN_S - 1).prefetches == ()
    assert decide(snapshot, recent, NOW + PREFETCH_AGAIN_S).prefetches != ()


def test_a_disk_that_nobody_has_measured_is_no_reason(make):
    assert read_ahead(world(make, [node(make)], {"m": 5}, measured=False)) == []


def test_deployments_of_one_checkpoint_count_together(make):
    snapshot = world(make, [node(make)], {"m": 1})
    twin = make.deployment("twin", digest="m", checkpoint="m")
    both = {"m": popular(1), "twin": popular(1.5)}
    snapshot = replace(snapshot, deployments={**snapshot.deployments, "twin": twin}, popularity=both)
    (prefetch,) = decide(snapshot, Recent(), NOW).prefetches
    assert (prefetch.digest, prefetch.deployment) == ("m", "twin")


# -- onto disks


@pytest.mark.parametrize(("requests", "copies"), [(3, []), (4, [("b", "m")])])
def test_what_is_asked_for_enough_gets_a_second_copy(make, requests, copies):
    nodes = [node(make, "a"), node(make, "b", holds=())]
    assert copied(world(make, nodes, {"m": requests}, max_copies=2)) == copies


def test_each_further_copy_takes_twice_the_requests_up_to_the_bound(make):
    nodes = [node(make, name, holds=[("m", SSD)] if name in "ab" else ()) for name in "abcd"]
    assert copied(world(make, nodes, {"m": 7}, max_copies=4)) == []
    assert copied(world(make, nodes, {"m": 8}, max_copies=4)) == [("c", "m")]
    assert copied(world(make, nodes, {"m": 80}, max_copies=2)) == []


def test_a_copy_goes_where_least_is_to_be_expected_then_to_the_emptiest_disk(make):
    nodes = [node(make, "a"), node(make, "b", holds=[("n", SSD)]), node(make, "c", holds=(), ssd_bytes=900)]
    assert copied(world(make, nodes, {"m": 9, "n": 20}, max_copies=2))[0][0] == "c"
    nodes = [node(make, "a"), node(make, "b", holds=(), ssd_bytes=700), node(make, "c", holds=(), ssd_bytes=900)]
    assert copied(world(make, nodes, {"m": 9}, max_copies=2)) == [("c", "m")]


@pytest.mark.parametrize(
    "fields",
    [
        {"ssd_bytes": 110},  # ten of them are a reserve
        {"devices": ()},
        {"state": NodeState.CORDONED},
        {"state": NodeState.DEAD},
    ],
)
def test_a_node_without_room_or_devices_gets_none(make, fields):
    nodes = [node(make, "a"), node(make, "b", holds=(), **fields)]
    assert copied(world(make, nodes, {"m": 50}, max_copies=2)) == []


def test_a_damaged_copy_is_left_to_people(make):
    damaged = node(make, "b")
    bad = tuple(replace(r, state=ResidencyState.QUARANTINED) for r in damaged.report.residencies)
    damaged = replace(damaged, report=replace(damaged.report, residencies=bad))
    assert copied(world(make, [node(make, "a"), damaged], {"m": 50}, max_copies=2)) == []


def test_one_copy_is_made_at_a_time_and_a_failed_one_not_again_for_long(make):
    snapshot = world(make, [node(make, "a"), node(make, "b", holds=())], {"m": 2000}, max_copies=2)
    assert copied(snapshot, copying=True) == []
    recent = Recent()
    recent.note(decide(snapshot, recent, NOW), NOW)
    assert decide(snapshot, recent, NOW + COPY_AGAIN_S - 1).copies == ()
    assert [copy.node for copy in decide(snapshot, recent, NOW + COPY_AGAIN_S).copies] == ["b"]


def test_nothing_is_done_unless_it_is_allowed_and_known(make):
    nodes = [node(make, "a"), node(make, "b", holds=())]
    off = world(make, nodes, {"m": 50}, prefetch=False)
    assert decide(off, Recent(), NOW) == decide(replace(off, popularity={}), Recent(), NOW)
    assert read_ahead(off) == copied(off) == []
    unsettled = replace(world(make, nodes, {"m": 50}, max_copies=2), settled=False)
    assert read_ahead(unsettled) == copied(unsettled) == []
