from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sllm.controller import forecast as forecasts
from sllm.controller.forecast import Forecast
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.migration import RecomputeCost, Round
from sllm.core.node import NodeReport, NodeState
from sllm.core.replica import ReplicaSpec
from sllm.core.request import RequestRow, RequestState
from sllm.core.snapshot import NodeView, Policy, ReplicaView, Snapshot
from sllm.migration.outlook import OVERHEAD_S, ROUND_TRIP_S


def replica(node: str = "a", digest: str = "m") -> ReplicaView:
    spec = ReplicaSpec(
        id=f"rep-{node}",
        deployment="app",
        revision=1,
        generation=1,
        checkpoint="m",
        digest=digest,
        devices=("d0",),
        capacity=4,
        max_model_len=64,
    )
    return ReplicaView(spec=spec, node=node)


def node(name: str, kind: DeviceKind) -> NodeView:
    device = Device(id="d0", kind=kind, state=DeviceState.LEASED, memory_bytes=1)
    report = NodeReport(
        name=name, incarnation="i", revision=1, address="a:1", version="0", engine="fake", warm=True, devices=(device,)
    )
    return NodeView(report=report, state=NodeState.READY, seen_at=0.0, last_seen=0.0)


NODES = {"a": node("a", DeviceKind.CPU), "g": node("g", DeviceKind.CUDA)}
SNAPSHOT = Snapshot(policy=Policy(), nodes=NODES, replicas={"rep-a": replica()}, deployments={}, loads={}, held={})


def row(**fields: Any) -> RequestRow:
    values = {"deployment": "app", "state": RequestState.RUNNING, "replica": "rep-a"}
    return RequestRow(id="req-1", **{**values, **fields})


def learnt(*rounds: Round) -> Forecast:
    forecast = Forecast()
    for measured in rounds:
        forecast.observe(replica(), NODES, measured)
    return forecast


def test_a_cost_is_of_a_checkpoint_and_a_kind_of_device():
    forecast = learnt(*(Round(tokens=t, cached_tokens=0, seconds=t * 0.001 + 0.02) for t in (100, 200, 300)))
    cost = forecast.cost(replica(), NODES)
    assert (cost.per_token_s, cost.fixed_s) == pytest.approx((0.001, 0.02))
    assert forecast.cost(replica("g"), NODES) == RecomputeCost()
    assert forecast.cost(replica(digest="other"), NODES) == RecomputeCost()
    assert forecast.cost(replica("unheard of"), NODES) == RecomputeCost()


def test_only_what_had_to_be_computed_counts():
    forecast = learnt(*(Round(tokens=t + 500, cached_tokens=500, seconds=t * 0.001) for t in (100, 200, 300)))
    assert forecast.cost(replica(), NODES).per_token_s == pytest.approx(0.001)


def test_its_error_is_told_once_it_is_known():
    rounds = [Round(tokens=t, cached_tokens=0, seconds=t * 0.001) for t in range(100, 1600, 100)]
    (known,) = learnt(*rounds[:2]).of("m")
    assert (known.kind, known.error) == (DeviceKind.CPU, None)
    (known,) = learnt(*rounds).of("m")
    assert known.error == pytest.approx((0.0, 0.0), abs=1e-6)
    assert learnt().of("m") == ()


def test_a_move_takes_a_recompute_of_everything_and_its_pause_one_of_a_part_of_a_block():
    forecast = learnt(*(Round(tokens=t, cached_tokens=0, seconds=t * 0.001) for t in (100, 200, 300)))
    outlook = forecast.outlook(row(prompt_tokens=100, output_tokens=900), SNAPSHOT)
    assert outlook.pause_s == pytest.approx(0.008 + ROUND_TRIP_S)
    assert outlook.move_s == pytest.approx(OVERHEAD_S + 1.0 + outlook.pause_s)


def test_how_long_a_request_runs_on_is_its_tokens_times_their_interval():
    forecast = Forecast()
    assert forecast.outlook(row(output_tokens=10, interval_s=0.1), SNAPSHOT).left_s is None
    assert forecast.outlook(row(output_tokens=10, max_tokens=30, interval_s=0.1), SNAPSHOT).left_s == pytest.approx(2)
    assert forecast.outlook(row(output_tokens=10, max_tokens=30), SNAPSHOT).left_s is None, "its pace is not known"
    for _ in range(5):
        forecast.finished(row(output_tokens=15))
    assert forecast.outlook(row(output_tokens=10, max_tokens=30, interval_s=0.1), SNAPSHOT).left_s == pytest.approx(0.5)
    assert forecast.outlook(row(output_tokens=12, interval_s=0.1), SNAPSHOT).left_s == pytest.approx(0.3)
    other = replace(row(output_tokens=10, interval_s=0.1), deployment="new")
    assert forecast.outlook(other, SNAPSHOT).left_s == pytest.approx(0.5), "those of others stand in"
    for _ in range(5):
        forecast.finished(replace(row(output_tokens=30), deployment="new"))
    assert forecast.outlook(other, SNAPSHOT).left_s == pytest.approx(2.0), "until its own are known"
    forecast.forget("new")
    assert forecast.outlook(other, SNAPSHOT).left_s == pytest.approx(1.25)
    forecast = Forecast()
    assert forecast.outlook(row(output_tokens=10, interval_s=0.1), SNAPSHOT).left_s is None


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(forecasts, "KEPT_ESTIMATES", 2)
    forecast = Forecast()
    for digest in ("m1", "m2", "m3"):
        forecast.observe(replica(digest=digest), NODES, Round(tokens=10, cached_tokens=0, seconds=1.0))
    assert [bool(forecast.of(digest)) for digest in ("m1", "m2", "m3")] == [False, True, True]


def test_choices_are_made_side_by_side() -> None:
    four = row(output_tokens=40, max_tokens=120, interval_s=0.1, choices=4)
    assert Forecast().outlook(four, SNAPSHOT).left_s == pytest.approx(2)
