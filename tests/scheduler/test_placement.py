from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.device import DeviceState
from sllm.core.node import NodeState
from sllm.core.residency import ResidencyState, Tier
from sllm.core.snapshot import Failures
from sllm.scheduler.placement import Placement, Room, Waiting, WaitsOn, place, place_in

DRAM, SSD = ("m", Tier.DRAM), ("m", Tier.SSD)


def test_prefers_dram_over_ssd(make):
    nodes = [make.node("a", holds=[SSD]), make.node("b", holds=[DRAM])]
    placed = place(make.snapshot(nodes=nodes, deployments=[make.deployment()]), "app", 0.0)
    assert isinstance(placed, Placement)
    assert (placed.node, placed.devices, placed.tier) == ("b", ("d0",), Tier.DRAM)


def test_says_why_each_other_candidate_lost(make):
    nodes = [make.node("a"), make.node("b", devices=()), make.node("c", state=NodeState.SUSPECT), make.node("d")]
    placed = place(make.snapshot(nodes=nodes, deployments=[make.deployment()]), "app", 0.0)
    assert {c.node: c.refused for c in placed.candidates} == {
        "a": "",
        "b": "0 of 1 devices are free",
        "c": "it is suspect",
        "d": "a is preferred",
    }


def test_prefers_the_node_with_fewer_replicas_then_the_name(make):
    nodes = [make.node(n, devices=("d0", "d1")) for n in "abc"]
    snapshot = make.snapshot(nodes=nodes, replicas=[make.replica("x", on="a")], deployments=[make.deployment()])
    assert place(snapshot, "app", 0.0).node == "b"


def test_prefers_a_node_whose_engine_is_warm(make):
    nodes = [make.node("a", holds=[DRAM], warm=False), make.node("b")]
    assert place(make.snapshot(nodes=nodes, deployments=[make.deployment()]), "app", 0.0).node == "b"


def test_goes_back_to_a_node_where_it_failed_only_if_there_is_no_other(make):
    failures = Failures(revision=1, count=1, retry_at=0.0, nodes=frozenset({"a"}))
    view = replace(make.deployment(), failures=failures)
    two, one = [make.node("a", holds=[DRAM]), make.node("b")], [make.node("a", holds=[DRAM])]
    assert place(make.snapshot(nodes=two, deployments=[view]), "app", 0.0).node == "b"
    assert place(make.snapshot(nodes=one, deployments=[view]), "app", 0.0).node == "a"


@pytest.mark.parametrize("state", [NodeState.SUSPECT, NodeState.CORDONED, NodeState.DEAD])
def test_places_only_on_ready_nodes(make, state):
    nodes = [make.node("a", state=state)]
    waiting = place(make.snapshot(nodes=nodes, deployments=[make.deployment()]), "app", 0.0)
    assert isinstance(waiting, Waiting)
    assert waiting.on is WaitsOn.NODES
    assert "'m'" in waiting.text


@pytest.mark.parametrize("state", [DeviceState.LEASED, DeviceState.DIRTY, DeviceState.LOST])
def test_waits_for_devices_that_are_not_free(make, state):
    nodes = [make.node("a", devices=[make.device("d0", state)])]
    waiting = place(make.snapshot(nodes=nodes, deployments=[make.deployment()]), "app", 0.0)
    assert waiting.on is WaitsOn.DEVICES


def test_a_device_is_taken_as_soon_as_a_start_is_planned_on_it(make):
    planned = make.replica("x", state=None)
    snapshot = make.snapshot(nodes=[make.node("a")], replicas=[planned], deployments=[make.deployment()])
    assert place(snapshot, "app", 0.0).on is WaitsOn.DEVICES


def test_takes_as_many_devices_as_a_replica_needs_and_only_large_enough_ones(make):
    devices = [make.device("d0", memory_bytes=10), make.device("d1"), make.device("d2")]
    snapshot = make.snapshot(nodes=[make.node("a", devices=devices)], deployments=[make.deployment(devices=2)])
    assert place(snapshot, "app", 0.0).devices == ("d1", "d2")


def test_a_copy_that_is_still_being_made_is_no_copy(make):
    view = make.node("a", holds=[])
    loading = make.residency("m", Tier.SSD, ResidencyState.LOADING)
    view = replace(view, report=replace(view.report, residencies=(loading,)))
    assert place(make.snapshot(nodes=[view], deployments=[make.deployment()]), "app", 0.0).on is WaitsOn.NODES


def test_room_without_a_replica_has_its_leased_devices(make):
    leased = make.node("a", devices=[make.device("d0", DeviceState.LEASED)])
    old = make.replica("x")
    snapshot = make.snapshot(nodes=[leased], replicas=[old], deployments=[make.deployment()])
    room = Room(snapshot)
    assert isinstance(place_in(room, snapshot.deployments["app"]), Waiting)
    assert place_in(room.without([old]), snapshot.deployments["app"]).devices == ("d0",)
    assert isinstance(place_in(room, snapshot.deployments["app"]), Waiting)
