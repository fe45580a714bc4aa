"""Commands that only ask: every one, in every form."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.replica import ReplicaState
from sllm.errors import NotFound
from sllm.rpc import control


def test_status_is_three_tables(ask):
    answer = ask("status")
    assert answer.code == 0
    assert [line for line in answer.out.splitlines() if line.isupper() and " " not in line.strip()] == [
        "DEPLOYMENTS",
        "REPLICAS",
        "NODES",
    ]
    assert "org/demo" in answer.out
    assert "a request waits" in answer.out
    assert "starting: loading 42%" in answer.out
    assert answer.err == ""


def test_status_shows_what_each_tier_holds(ask):
    header, row = ask("status").out.split("NODES\n")[1].splitlines()
    cells = {name: row[header.index(name) :].split("  ")[0].strip() for name in ("DEVICE ", "DRAM", "SSD")}
    assert cells == {"DEVICE ": "-", "DRAM": "demo-model (loading)", "SSD": "demo-model"}


def test_the_top_tier_is_called_gpu_where_there_are_gpus(ask, controller):
    gpu = Device(id="GPU-1", kind=DeviceKind.CUDA, state=DeviceState.FREE, memory_bytes=1)
    node = controller.status.nodes[0]
    node = replace(node, report=replace(node.report, devices=(gpu,)))
    controller.status = replace(controller.status, nodes=(node,))
    out = ask("status").out
    assert "GPU" in out
    assert "1/1 cuda" in out


def test_status_as_json_has_deployments_replicas_and_nodes(ask):
    data = ask("status", "-o", "json").json
    assert list(data) == ["version", "deployments", "replicas", "nodes", "estimator"]
    deployment = data["deployments"][0]
    assert deployment["name"] == "org/demo"
    assert deployment["state"] == "starting"
    assert deployment["engine_args"] == {"seed": "7"}
    assert deployment["keep_alive_s"] == 60.0
    assert deployment["created_at"] == "2025-01-01T12:00:00.000Z"
    replica = data["replicas"][0]
    assert replica["id"] == "rep-0a1b2c3d4e5f"
    assert replica["devices"] == ["cpu-0"]
    assert replica["state"] == "starting"
    assert replica["ready_at"] is None


def test_status_by_name_says_the_kind_of_each(ask):
    assert ask("status", "-o", "name").out.split() == ["deployment/org/demo", "replica/rep-0a1b2c3d4e5f", "node/node-1"]


def test_nodes_as_json_follow_the_contract(ask):
    (node,) = ask("nodes", "--output", "json").json
    assert node["name"] == "node-1"
    assert node["state"] == "ready"
    assert node["devices"][0]["id"] == "cpu-0"
    assert node["devices"][0]["kind"] == "cpu"
    assert node["devices"][0]["state"] == "leased"
    assert node["tiers"]["ssd"]["capacity_bytes"] == 200 << 30
    assert node["tiers"]["dram"]["checkpoints"] == [
        {"name": "demo-model", "digest": "sha256:5f3c", "state": "loading", "size_bytes": 14_000_000}
    ]
    assert node["loads"] == [
        {"number": 1, "digest": "sha256:5f3c", "size_bytes": 14, "tier": "ssd", "queue_s": 0.5, "read_s": 1.5}
    ]
    assert node["probe"] is None


def test_nodes_as_a_table_and_by_name(ask):
    out = ask("nodes").out
    assert "13.4 MiB of 200 GiB" in out
    assert "1/2 cpu" in out
    assert ask("nodes", "-o", "name").out == "node-1\n"


def test_requests_in_every_form(ask):
    assert "req-00ff" in ask("requests").out
    assert ask("requests", "-o", "name").out == "req-00ff\n"
    assert ask("requests", "-o", "json").json == [
        {
            "id": "req-00ff",
            "deployment": "org/demo",
            "replica": "rep-0a1b2c3d4e5f",
            "node": "node-1",
            "state": "running",
            "prompt_tokens": 11,
            "output_tokens": 5,
            "max_tokens": 0,
            "interval_s": 0.0,
            "moves": 0,
            "started_at": "2025-01-01T12:00:00.000Z",
        }
    ]


def test_checkpoint_list_in_every_form(ask):
    assert "LlamaForCausalLM" in ask("checkpoint", "list").out
    assert ask("checkpoint", "list", "-o", "name").out == "demo-model\n"
    (row,) = ask("checkpoint", "list", "-o", "json").json
    assert row["size_bytes"] == 14_000_000
    assert row["copies"][1] == {"node": "node-1", "tier": "dram", "state": "loading", "size_bytes": 14_000_000}


def test_checkpoint_show_in_every_form(ask):
    out = ask("checkpoint", "show", "demo-model").out
    assert "sha256:5f3c" in out
    assert "DRAM" in out
    assert ask("checkpoint", "show", "demo-model", "-o", "name").out == "demo-model\n"
    assert ask("checkpoint", "show", "demo-model", "-o", "json").json["tensor_count"] == 39


def test_showing_an_unknown_checkpoint_is_not_found(ask):
    answer = ask("checkpoint", "show", "nope")
    assert answer.code == 3
    assert answer.err == "error: there is no checkpoint 'nope'\nhint: see `sllm checkpoint list`\n"


def test_logs_in_every_form(ask, controller):
    assert ask("logs", "rep-0a1b2c3d4e5f", "-n", "2").out == "first line\nsecond line\n"
    assert controller.asked == [control.ReadLogsRequest(target="rep-0a1b2c3d4e5f", lines=2)]
    assert ask("logs", "node-1", "-o", "json").json == ["first line", "second line"]
    assert ask("logs", "node-1", "-o", "name").out == "node-1\n"


def test_version_in_every_form(sllm):
    assert sllm("version").out.startswith("sllm 0.")
    assert sllm("version", "-o", "json").json["version"] == sllm("version", "-o", "name").out.strip()


def test_an_empty_cluster_is_an_empty_array_and_a_table_that_says_so(ask, controller):
    controller.status = control.ClusterStatus(version="0.1.0")
    assert ask("nodes", "-o", "json").out == "[]\n"
    assert ask("nodes", "-o", "name").out == ""
    assert "(none" in ask("nodes").out
    assert ask("status").out.count("(none") == 3


def test_text_of_others_cannot_break_a_table_or_move_the_cursor(ask, controller):
    row = controller.status.replicas[0]
    status = replace(row.status, state=ReplicaState.FAILED, error="line one\nline two \x1b[2J")
    controller.status = replace(controller.status, replicas=(replace(row, status=status),))
    out = ask("status").out
    assert "failed: line one line two [2J" in out
    assert "\x1b" not in out


def test_what_the_controller_refuses_is_one_line_a_hint_and_its_exit_code(ask, controller):
    controller.error = NotFound("there is no node 'x'", hint="see `sllm nodes`")
    answer = ask("logs", "x")
    assert answer.code == 3
    assert answer.out == ""
    assert answer.err == "error: there is no node 'x'\nhint: see `sllm nodes`\n"


def test_with_json_the_error_is_json_on_stderr(ask, controller):
    controller.error = NotFound("there is no node 'x'", hint="see `sllm nodes`")
    answer = ask("logs", "x", "-o", "json")
    assert answer.code == 3
    assert answer.out == ""
    assert json.loads(answer.err)["error"] == {
        "reason": "NOT_FOUND",
        "message": "there is no node 'x'",
        "hint": "see `sllm nodes`",
        "retry_after_s": None,
    }


def test_a_defect_of_the_controller_exits_1_without_its_text(ask, controller):
    controller.error = RuntimeError("secret detail")
    answer = ask("nodes")
    assert answer.code == 1
    assert "secret detail" not in answer.err
    assert answer.err.startswith("error: ")


@pytest.mark.parametrize("command", [["status"], ["nodes"], ["requests"], ["checkpoint", "list"]])
def test_an_unknown_form_is_a_usage_error(sllm, command):
    answer = sllm(*command, "-o", "xml")
    assert answer.code == 2
    assert answer.err.startswith("error: Invalid value for '-o' / '--output'")
