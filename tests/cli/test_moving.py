"""Migrate, drain, cordon, uncordon: what they send, and what a dry run shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.device import DeviceKind
from sllm.core.migration import MigrationPlan, RecomputeCost
from sllm.core.operation import OperationState
from sllm.errors import NotFound, QueueFull
from sllm.rpc import control


def test_a_request_or_a_replica_is_moved_to_a_node(ask, controller):
    assert ask("migrate", "req-00ff", "--to", "node-2").out == "req-00ff moved\n"
    assert ask("migrate", "--replica", "rep-1", "--to", "node-2").out == "rep-1 moved\n"
    first, second = controller.asked[0], controller.asked[2]
    assert (first.request, first.replica, first.node) == ("req-00ff", None, "node-2")
    assert (second.request, second.replica) == (None, "rep-1")
    assert first.request_id != second.request_id


@pytest.mark.parametrize("command", [[], ["req-00ff", "--replica", "rep-1"], ["rep-1"]])
def test_which_of_both_must_be_clear(ask, controller, command):
    answer = ask("migrate", *command, "--to", "node-2")
    assert answer.code == 2
    assert "hint: " in answer.err
    assert controller.asked == []


def test_a_migration_needs_a_destination(ask, controller):
    answer = ask("migrate", "req-00ff")
    assert answer.code == 2
    assert "--to" in answer.err
    assert controller.asked == []


def test_a_deadline_is_a_duration(ask, controller):
    ask("drain", "node-1")
    ask("drain", "node-1", "--deadline", "2m")
    assert [r.deadline_s for r in controller.asked[::2]] == [120.0, 120.0]
    ask("drain", "node-1", "--deadline", "500ms")
    assert controller.asked[4].deadline_s == 0.5
    answer = ask("drain", "node-1", "--deadline", "later")
    assert answer.code == 2
    assert len(controller.asked) == 6


def test_what_a_drain_has_left_is_told_and_exits_8(ask, controller):
    failed = {
        "state": OperationState.FAILED,
        "error": "node 'node-1' is not empty in time; left are req-1",
        "hint": "x",
    }
    controller.changes = ({**failed, "error_reason": "OPERATION_FAILED"},)
    answer = ask("drain", "node-1")
    assert answer.code == 8
    assert "left are req-1" in answer.err


DRY = [["migrate", "req-00ff", "--to", "node-2", "--dry-run"], ["drain", "node-1", "--dry-run"]]
each_dry_run = pytest.mark.parametrize("command", DRY, ids=["migrate", "drain"])


@each_dry_run
def test_a_dry_run_asks_only(ask, controller, command):
    out = ask(*command).out
    assert len(controller.asked) == 1
    assert "node-2 (rep-22)" in out
    assert "12 ms" in out
    assert "9.2 s" in out
    assert "it ends soon" in out
    assert "start a replica" in out
    assert "2 replicas would be stopped" in out


@each_dry_run
def test_a_dry_run_as_json_and_by_name(ask, command):
    data = ask(*command, "-o", "json").json
    assert data["moves"][0]["target_node"] == "node-2"
    assert data["moves"][1]["left_s"] is None
    assert (data["starts"], data["why"]) == (["node-3"], "2 replicas would be stopped")
    assert ask(*command, "-o", "name").out == "req-00ff\n"


@each_dry_run
def test_a_dry_run_of_nothing_says_so(ask, controller, command):
    controller.plan = MigrationPlan()
    assert ask(*command).out == "(no request would be moved)\n"


@each_dry_run
def test_a_dry_run_is_refused_as_the_command_is(ask, controller, command):
    controller.error = QueueFull("no device is free", hint="see `sllm nodes`")
    answer = ask(*command)
    assert (answer.code, answer.out) == (7, "")


@pytest.mark.parametrize(("verb", "cordoned"), [("cordon", True), ("uncordon", False)])
def test_a_node_or_a_device_is_closed_and_opened(ask, controller, verb, cordoned):
    assert ask(verb, "node-1").out == f"node-1 {verb}ed\n"
    assert ask(verb, "node-1/gpu-0/1", "-o", "json").json == {
        "node": "node-1",
        "device": "gpu-0/1",
        "cordoned": cordoned,
    }
    assert ask(verb, "node-1/gpu-0", "-o", "name").out == "node-1/gpu-0\n"
    assert [(r.node, r.device, r.cordoned) for r in controller.asked] == [
        ("node-1", None, cordoned),
        ("node-1", "gpu-0/1", cordoned),
        ("node-1", "gpu-0", cordoned),
    ]


@pytest.mark.parametrize("place", ["node-1/", "/gpu", "", "no such"])
def test_what_names_no_place_is_refused(ask, controller, place):
    assert ask("cordon", place).code == 2
    assert controller.asked == []


def test_a_node_that_is_not_there_is_not_found(ask, controller):
    controller.error = NotFound("no node 'z'", hint="see `sllm nodes`")
    assert ask("cordon", "z").code == 3


def test_cordoned_devices_are_shown(ask, controller):
    (node,) = controller.status.nodes
    controller.status = replace(controller.status, nodes=(replace(node, cordoned_devices=("cpu-1",)),))
    assert "1/2 cpu (1 cordoned)" in ask("nodes").out
    assert ask("nodes", "-o", "json").json[0]["cordoned_devices"] == ["cpu-1"]


def test_requests_show_their_moves(ask, controller):
    (row,) = controller.requests.requests
    controller.requests = replace(controller.requests, requests=(replace(row, moves=3, max_tokens=900),))
    assert ask("requests", "-o", "json").json[0]["moves"] == 3
    assert "MOVES" in ask("requests").out


def test_what_a_recompute_takes_is_shown_with_the_checkpoint(ask, controller):
    (row,) = controller.checkpoints.checkpoints
    cost = RecomputeCost(per_token_s=0.000123, fixed_s=0.0045, observations=9)
    known = control.RecomputeRow(kind=DeviceKind.CPU, cost=cost, error_p50=0.07, error_p95=0.2)
    controller.checkpoints = control.CheckpointList(checkpoints=(replace(row, recomputes=(known,)),))
    assert "123 us a token + 4.5 ms (9 rounds, wrong by 7% (median))" in ask("checkpoint", "show", "demo-model").out
    assert ask("checkpoint", "show", "demo-model", "-o", "json").json["recompute"] == [
        {
            "kind": "cpu",
            "per_token_s": 0.000123,
            "fixed_s": 0.0045,
            "observations": 9,
            "error_p50": 0.07,
            "error_p95": 0.2,
        }
    ]
