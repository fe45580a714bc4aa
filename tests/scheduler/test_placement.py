from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.decision import WaitsOn
from sllm.core.device import DeviceState
from sllm.core.node import NodeState
from sllm.core.residency import ResidencyState, Tier
from sllm.core.snapshot import Failures
from sllm.scheduler.placement import Placement, Waiting, place, refusals
from sllm.scheduler.room import Room

DRAM, SSD = ("m", Tier.DRAM), ("m", Tier.SSD)


def placed_in(snapshot):
    return place(Room(snapshot), snapshot.deployments["app"])


def test_prefers_dram_over_ssd(make):
    nodes = [make.node("a", holds=[SSD]), make.node("b", holds=[DRAM])]
    placed = placed_in(make.snapshot(nodes=nodes, deployments=[make.deployment()]))
    assert isinstance(placed, Placement)
    assert (placed.node, placed.devices, placed.tier) == ("b", ("d0",), Tier.DRAM)


def test_says_why_each_other_candidate_lost(make):
    nodes = [make.node("a"), make.node("b", devices=()), make.node("c", state=NodeState.SUSPECT), make.node("d")]
    placed = placed_in(make.snapshot(nodes=nodes, deployments=[make.deployment()]))
    assert {c.node: c.refused for c in placed.candidates} == {
        "a": "",
        "b": "0 of 1 devices are free",
        "c": "it is suspect",
        "d": "a is preferred",
    }


def test_prefers_the_node_with_fewer_replicas_then_the_name(make):
    nodes = [make.node(n, devices=("d0", "d1")) for n in "abc"]
    snapshot = make.snapshot(nodes=nodes, replicas=[make.replica("x", on="a")], deployments=[make.deployment()])
    assert placed_in(snapshot).node == "b"


def test_prefers_a_node_whose_engine_is_warm(make):
    nodes = [make.node("a", holds=[DRAM], warm=False), make.node("b")]
    assert placed_in(make.snapshot(nodes=nodes, deployments=[make.deployment()])).node == "b"


def test_goes_back_to_a_node_where_it_failed_only_if_there_is_no_other(make):
    failures = Failures(revision=1, count=1, retry_at=0.0, nodes=frozenset({"a"}))
    view = replace(make.deployment(), failures=failures)
    two, one = [make.node("a", holds=[DRAM]), make.node("b")], [make.node("a", holds=[DRAM])]
    assert placed_in(make.snapshot(nodes=two, deployments=[view])).node == "b"
    assert placed_in(make.snapshot(nodes=one, deployments=[view])).node == "a"


@pytest.mark.parametrize("state", [NodeState.SUSPECT, NodeState.CORDONED, NodeState.DEAD])
def test_places_only_on_ready_nodes(make, state):
    nodes = [make.node("a", state=state)]
    waiting = placed_in(make.snapshot(nodes=nodes, deployments=[make.deployment()]))
    assert isinstance(waiting, Waiting)
    assert waiting.on is WaitsOn.NODES
    assert "'m'" in waiting.text


@pytest.mark.parametrize("state", [DeviceState.LEASED, DeviceState.DIRTY, DeviceState.LOST])
def test_waits_for_devices_that_are_not_free(make, state):
    nodes = [make.node("a", devices=[make.device("d0", state)])]
    waiting = placed_in(make.snapshot(nodes=nodes, deployments=[make.deployment()]))
    assert waiting.on is WaitsOn.DEVICES


def test_a_device_is_taken_as_soon_as_a_start_is_planned_on_it(make):
    planned = make.replica("x", state=None)
    snapshot = make.snapshot(nodes=[make.node("a")], replicas=[planned], deployments=[make.deployment()])
    assert placed_in(snapshot).on is WaitsOn.DEVICES


def test_takes_as_many_devices_as_a_replica_needs_and_only_large_enough_ones(make):
    devices = [make.device("d0", memory_bytes=10), make.device("d1"), make.device("d2")]
    snapshot = make.snapshot(nodes=[make.node("a", devices=devices)], deployments=[make.deployment(devices=2)])
    assert placed_in(snapshot).devices == ("d1", "d2")


def test_a_copy_that_is_still_being_made_is_no_copy(make):
    view = make.node("a", holds=[])
    loading = make.residency("m", Tier.SSD, ResidencyState.LOADING)
    view = replace(view, report=replace(view.report, residencies=(loading,)))
    assert placed_in(make.snapshot(nodes=[view], deployments=[make.deployment()])).on is WaitsOn.NODES


def test_a_device_that_is_free_but_too_small_is_not_said_to_be_taken(make):
    small = make.node("a", devices=[make.device("d0", memory_bytes=10)])
    waiting = placed_in(make.snapshot(nodes=[small], deployments=[make.deployment()]))
    assert (waiting.on, waiting.text) == (WaitsOn.MEMORY, "waiting for devices with 100 bytes of memory")
    (candidate,) = waiting.candidates
    assert candidate.refused == "0 of 1 devices have the 100 bytes that are needed, the largest has 10"


def test_a_free_device_that_is_too_small_is_told_from_a_large_one_that_is_taken(make):
    devices = [make.device("d0", memory_bytes=10), make.device("d1", DeviceState.LEASED)]
    waiting = placed_in(make.snapshot(nodes=[make.node("a", devices=devices)], deployments=[make.deployment()]))
    assert waiting.on is WaitsOn.DEVICES
    assert refusals(waiting.candidates) == (
        "a: 0 of 1 devices are free, and 1 with less than the 100 bytes that are needed"
    )


def test_of_many_nodes_only_the_first_are_told_of(make):
    nodes = [make.node(f"n{i}", state=NodeState.SUSPECT) for i in range(6)]
    waiting = placed_in(make.snapshot(nodes=nodes, deployments=[make.deployment()]))
    told = refusals(waiting.candidates)
    assert told.startswith("n0: it is suspect; n1: ")
    assert told.endswith("; and 2 more")
