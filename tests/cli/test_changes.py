"""Commands that ask for work: what they send, how they wait, and how that ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sllm.core.operation import OperationState
from sllm.errors import Conflict
from sllm.rpc import control

CHANGES = {
    "checkpoint.add": ["checkpoint", "add", "demo-model", "/models/demo"],
    "checkpoint.remove": ["checkpoint", "remove", "demo-model"],
    "checkpoint.verify": ["checkpoint", "verify", "demo-model"],
    "deploy": ["deploy", "org/demo", "--checkpoint", "demo-model"],
    "delete": ["delete", "org/demo"],
    "scale": ["scale", "org/demo", "--replicas", "1"],
    "migrate": ["migrate", "req-00ff", "--to", "node-2"],
    "drain": ["drain", "node-1"],
}
each_change = pytest.mark.parametrize(("kind", "command"), CHANGES.items(), ids=CHANGES)


@each_change
def test_waits_until_it_is_done_and_says_so(ask, controller, kind, command):
    answer = ask(*command)
    assert answer.code == 0
    words = ("added", "removed", "verified", "deployed", "deleted", "scaled", "moved", "drained")
    assert answer.out.rstrip().endswith(words)
    assert controller.asked[1:] == [control.WatchOperationRequest(id="op-77aa")]


@each_change
def test_progress_is_on_stderr_in_plain_lines(ask, kind, command):
    assert f"{kind} " in ask(*command).err
    assert ": copying 50%" in ask(*command).err


@each_change
def test_as_json_it_is_the_operation_alone_on_stdout(ask, kind, command):
    data = ask(*command, "-o", "json").json
    assert data["kind"] == kind
    assert data["state"] == "done"
    assert data["id"] == "op-77aa"


@each_change
def test_by_name_it_is_the_operations_id(ask, kind, command):
    assert ask(*command, "-o", "name").out == "op-77aa\n"


@each_change
def test_without_waiting_it_says_that_the_work_goes_on(ask, controller, kind, command):
    controller.endless = True
    answer = ask(*command, "--no-wait")
    assert answer.code == 0
    assert "under way as op-77aa" in answer.out
    assert len(controller.asked) == 1


@each_change
def test_a_wait_that_takes_too_long_exits_124_with_the_operations_id(ask, controller, kind, command):
    controller.changes, controller.endless = ({"phase": "copying", "progress": 0.25},), True
    answer = ask(*command, "--timeout", "300ms")
    assert answer.code == 124
    assert "operation op-77aa goes on" in answer.err
    assert "copying 25%" in answer.err
    assert answer.out == ""


def test_work_that_fails_is_told_with_its_own_reason_and_exit_code(ask, controller):
    failed = {"state": OperationState.FAILED, "error": "17 GiB do not fit in 4 GiB", "hint": "take a smaller one"}
    controller.changes = ({**failed, "error_reason": "CAPACITY_EXCEEDED"},)
    answer = ask("deploy", "big", "--checkpoint", "big")
    assert answer.code == 7
    assert answer.out == ""
    assert answer.err.endswith("error: 17 GiB do not fit in 4 GiB\nhint: take a smaller one\n")


def test_work_that_fails_without_a_reason_exits_8(ask, controller):
    controller.changes = ({"state": OperationState.FAILED},)
    answer = ask("deploy", "demo", "--checkpoint", "demo")
    assert answer.code == 8
    assert "deploy demo failed" in answer.err


def test_a_refusal_at_once_has_its_exit_code(ask, controller):
    controller.error = Conflict("checkpoint demo-model is in use by org/demo", hint="delete it first")
    answer = ask("checkpoint", "remove", "demo-model")
    assert answer.code == 4
    assert answer.err == "error: checkpoint demo-model is in use by org/demo\nhint: delete it first\n"


def test_a_controller_that_stops_telling_is_unreachable_and_the_id_is_given(ask, controller):
    controller.changes = ({"phase": "copying"},)
    answer = ask("deploy", "demo", "--checkpoint", "demo")
    assert answer.code == 6
    assert "operation op-77aa may go on" in answer.err


def test_a_wrong_timeout_changes_nothing(ask, controller):
    answer = ask("delete", "demo", "--timeout", "soon")
    assert answer.code == 2
    assert answer.err.startswith("error: 'soon' is not a duration\nhint: ")
    assert controller.asked == []


def test_ctrl_c_while_waiting_exits_130_with_the_operations_id(controller):
    controller.changes, controller.endless = ({"phase": "copying"},), True
    command = [sys.executable, "-m", "sllm.cli.main", "delete", "demo", "--controller", controller.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "delete demo: copying\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines() == ["operation op-77aa goes on; see `sllm status`", "interrupted"]


def test_a_relative_source_is_made_absolute(ask, controller, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask("checkpoint", "add", "demo-model", "models/../demo")
    (request, _) = controller.asked
    assert request.source == str(tmp_path / "demo")
    assert request.nodes == ()
    assert not request.all_nodes


def test_nodes_are_chosen_by_name_or_all(ask, controller):
    ask("checkpoint", "add", "m", "/m", "--node", "n1", "--node", "n2")
    ask("checkpoint", "add", "m", "/m", "--all")
    ask("checkpoint", "remove", "m", "--node", "n1")
    adds = [request for request in controller.asked if not isinstance(request, control.WatchOperationRequest)]
    assert [request.nodes for request in adds] == [("n1", "n2"), (), ("n1",)]
    assert adds[1].all_nodes


def test_choosing_nodes_and_all_is_refused(ask, controller):
    answer = ask("checkpoint", "add", "m", "/m", "--node", "n1", "--all")
    assert answer.code == 2
    assert controller.asked == []


def test_deploy_sends_the_whole_wish(ask, controller):
    ask(
        *["deploy", "org/chat", "--checkpoint", "llama", "--min", "1", "--max", "4", "--devices", "2"],
        *["--keep-alive", "5m", "--target-concurrency", "16", "--max-model-len", "2048"],
        *["--engine-arg", "max-logprobs=20", "--engine-arg", 'hf_overrides={"a": "b=c"}'],
    )
    spec = controller.asked[0].spec
    assert (spec.name, spec.checkpoint) == ("org/chat", "llama")
    assert (spec.min_replicas, spec.max_replicas, spec.devices) == (1, 4, 2)
    assert (spec.keep_alive_s, spec.target_concurrency, spec.max_model_len) == (300.0, 16, 2048)
    assert spec.engine_args == {"max_logprobs": "20", "hf_overrides": '{"a": "b=c"}'}


def test_deploy_has_the_documented_defaults(ask, controller):
    ask("deploy", "demo", "--checkpoint", "m")
    spec = controller.asked[0].spec
    assert (spec.min_replicas, spec.max_replicas, spec.devices, spec.keep_alive_s) == (0, 2, 1, 60.0)
    assert (spec.target_concurrency, spec.max_model_len, spec.engine_args) == (8, None, {})


def test_deploying_more_at_least_than_the_default_most_raises_the_most(ask, controller):
    ask("deploy", "demo", "--checkpoint", "m", "--min", "5")
    assert controller.asked[0].spec.max_replicas == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--min", "3", "--max", "1"], "min is 3 and max is 1"),
        (["--engine-arg", "seed"], "--engine-arg 'seed' is not KEY=VALUE"),
        (["--engine-arg", "seed=1", "--engine-arg", "--seed=2"], "'seed' is given twice"),
        (["--engine-arg", "max-logprob=1"], "unknown engine argument 'max_logprob'"),
        (["--keep-alive", "long"], "'long' is not a duration"),
        (["--devices", "0"], "at least 1"),
    ],
)
def test_a_wrong_wish_is_refused_before_it_is_sent(ask, controller, args, message):
    answer = ask("deploy", "demo", "--checkpoint", "m", *args)
    assert answer.code == 2
    assert message in answer.err
    assert controller.asked == []


@pytest.mark.parametrize(
    "command",
    [
        ["deploy", "a/b/c", "--checkpoint", "m"],
        ["deploy", "demo", "--checkpoint", "org/m"],
        ["delete", "../etc"],
        ["scale", "", "--replicas", "1"],
        ["checkpoint", "add", "org/m", "/m"],
        ["checkpoint", "remove", "m", "--node", "a b"],
    ],
)
def test_a_name_with_forbidden_characters_is_refused_before_it_is_sent(ask, controller, command):
    answer = ask(*command, "-o", "json")
    assert answer.code == 2
    error = json.loads(answer.err)["error"]
    assert error["reason"] == "INVALID_ARGUMENT"
    assert "use letters" in error["hint"]
    assert controller.asked == []


def test_scale_sends_a_number_or_bounds(ask, controller):
    ask("scale", "demo", "--replicas", "0")
    ask("scale", "demo", "--min", "1", "--max", "3")
    number, bounds = (r for r in controller.asked if isinstance(r, control.ScaleRequest))
    assert (number.replicas, number.min_replicas, number.max_replicas) == (0, None, None)
    assert (bounds.replicas, bounds.min_replicas, bounds.max_replicas) == (None, 1, 3)


@pytest.mark.parametrize("args", [[], ["--replicas", "1", "--max", "2"]])
def test_scale_wants_a_number_or_bounds(ask, controller, args):
    answer = ask("scale", "demo", *args)
    assert answer.code == 2
    assert "either --replicas, or --min and --max" in answer.err
    assert controller.asked == []


def test_every_request_has_an_id_of_its_own(ask, controller):
    ask("delete", "demo")
    ask("delete", "demo")
    ids = {request.request_id for request in controller.asked if isinstance(request, control.DeleteRequest)}
    assert len(ids) == 2


def test_stdout_that_is_closed_early_is_no_traceback(controller):
    command = [sys.executable, "-m", "sllm.cli.main", "status", "--controller", controller.address]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr
