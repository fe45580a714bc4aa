"""`sllm explain`: what was predicted beside what was measured, and why each other node lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.replica import ReplicaState
from sllm.core.startup import EstimatorError
from sllm.errors import NotFound

ID = "rep-0a1b2c3d4e5f"


def cells(line: str) -> list[str]:
    return [cell for cell in (part.strip() for part in line.split("  ")) if cell]


def table(out: str, title: str) -> list[list[str]]:
    """The rows under a title, its header first."""
    return [cells(line) for line in out.split(f"{title}\n")[1].split("\n\n")[0].splitlines()]


def test_the_target_is_sent_as_it_is(ask, controller):
    for target in ("org/demo", ID, "req-00ff"):
        ask("explain", target)
    assert [request.target for request in controller.asked] == ["org/demo", ID, "req-00ff"]


def test_a_start_is_a_waterfall_of_what_was_predicted_and_what_was_measured(ask):
    out = ask("explain", "org/demo").out
    header, *phases, total = table(out, f"START OF {ID} ON node-1 at 2025-01-01T12:00:00.000Z")
    assert header == ["PHASE", "PREDICTED", "MEASURED"]
    assert [(row[0], row[1], row[3]) for row in phases] == [
        ("queued", "0.06 s", "0.12 s"),
        ("forking", "0.25 s", "0.38 s"),
        ("loading", "1.00 s", "1.50 s"),
        ("building", "0.50 s", "0.50 s"),
    ]
    assert total == ["all", "1.81 s", "2.50 s", "as it came"]
    predicted, measured = ([row[column] for row in phases] for column in (2, 4))
    assert measured == ["█···············", "·██·············", "···██████████···", "·············███"]
    assert predicted == ["█···············", "██··············", "··██████········", "········████····"]


def test_the_phases_of_a_waterfall_follow_each_other(ask):
    _, *phases, _ = table(ask("explain", "org/demo").out, f"START OF {ID} ON node-1 at 2025-01-01T12:00:00.000Z")
    for column in (2, 4):
        bars = [row[column] for row in phases]
        assert {len(bar) for bar in bars} == {16}
        assert [bar.index("█") for bar in bars] == sorted(bar.index("█") for bar in bars)
        assert all(bar.strip("·") == "█" * bar.count("█") for bar in bars), "each is in one piece"


def test_every_candidate_says_what_it_would_take_and_why_it_lost(ask):
    header, *rows = table(ask("explain", "org/demo").out, f"CANDIDATES OF {ID}")
    assert header == ["NODE", "READY IN", "QUEUED", "WARMING", "FORKING", "LOADING", "BUILDING", "WHY NOT"]
    reads = "(reads 13.4 MiB from SSD)"
    assert rows == [
        ["node-1", "1.81 s", "0.06", "0.00", "0.25", "1.00", "0.50", f"taken {reads}"],
        ["node-2", "2.81 s", "0.06", "0.00", "0.25", "2.00", "0.50", f"2.8 s, of which 2.0 s loading from SSD {reads}"],
        ["node-3", "-", "-", "-", "-", "-", "-", "0 of 1 devices are free"],
        ["and 7 more"],
    ]


def test_what_it_waits_for_and_where_it_would_start_now_is_told_guesses_marked(ask):
    out = ask("explain", "org/demo").out
    assert cells(out.splitlines()[1]) == ["waits for", "waiting for a free device"]
    _, row = table(out, "IF A REPLICA WERE STARTED NOW")
    assert row[:2] == ["node-2", "~4.31 s"]
    assert row[6] == "~2.00"
    assert "LAST STARTS" not in out, "there was one"


def test_several_starts_are_listed_and_the_newest_is_shown(ask, controller):
    newest = controller.explanation.decisions[0]
    failed = replace(newest, replica="rep-1", ready_at=None, state=None, error="no memory")
    found = replace(newest, replica="rep-2", estimate=None, decided_at=0.0, state=ReplicaState.STARTING, ready_at=None)
    controller.explanation = replace(controller.explanation, decisions=(newest, failed, found))
    out = ask("explain", "org/demo").out
    assert "START OF rep-1" not in out
    assert table(out, "LAST STARTS")[1:] == [
        [ID, "node-1", "2025-01-01T12:00:00.000Z", "1.81 s", "2.50 s", "ready"],
        ["rep-1", "node-1", "2025-01-01T12:00:00.000Z", "1.81 s", "-", "gone: no memory"],
        ["rep-2", "node-1", "-", "-", "-", "starting"],
    ]
    assert ask("explain", "org/demo", "-o", "name").out.split() == [ID, "rep-1", "rep-2"]


def test_a_start_that_nobody_estimated_has_half_a_waterfall(ask, controller):
    found = replace(controller.explanation.decisions[0], estimate=None, candidates=(), omitted=0, ready_at=None)
    controller.explanation = replace(controller.explanation, decisions=(found,))
    out = ask("explain", ID).out
    _, queued, *_, total = table(out, f"START OF {ID} ON node-1 at 2025-01-01T12:00:00.000Z")
    assert queued == ["queued", "-", "0.12 s", "█···············"]
    assert total == ["all", "-", "2.50 s", "so far"]


def test_a_request_says_when_it_was_held_and_granted(ask, controller):
    (row,) = controller.requests.requests
    controller.explanation = replace(
        controller.explanation, request=row, held_at=row.started_at, granted_at=1735732803.5
    )
    rows = [cells(line) for line in ask("explain", "req-00ff").out.splitlines()[1:6]]
    assert rows[1:5] == [
        ["request", "req-00ff, running"],
        ["replica", f"{ID} on node-1"],
        ["held at", "2025-01-01T12:00:00.000Z"],
        ["granted at", "2025-01-01T12:00:03.500Z, after 3.50 s"],
    ]
    data = ask("explain", "req-00ff", "-o", "json").json
    assert (data["request"]["id"], data["granted_at"]) == ("req-00ff", "2025-01-01T12:00:03.500Z")


def test_json_has_all_of_it(ask):
    data = ask("explain", "org/demo", "-o", "json").json
    assert list(data) == ["deployment", "waits_for", "request", "held_at", "granted_at", "decisions", "candidates"]
    (decision,) = data["decisions"]
    assert (decision["replica"], decision["priority"], decision["state"]) == (ID, "request", "ready")
    assert (decision["measured_s"], decision["estimate"]["total_s"]) == (2.5, 1.8125)
    assert decision["estimate"]["parts"]["loading"] == {"seconds": 1.0, "basis": "measured", "observations": 5}
    assert decision["estimate"]["phases_s"] == {"queued": 0.0625, "forking": 0.25, "loading": 1.0, "building": 0.5}
    assert decision["phases_s"] == {"queued": 0.125, "forking": 0.375, "loading": 1.5, "building": 0.5}
    assert [(c["node"], c["taken"], c["waits_on"]) for c in decision["candidates"]] == [
        ("node-1", True, None),
        ("node-2", False, None),
        ("node-3", False, "devices"),
    ]
    assert data["candidates"][0]["estimate"]["guessed"] is True


def test_what_is_not_known_exits_3_with_a_hint(ask, controller):
    controller.error = NotFound("no deployment 'x'", hint="see `sllm status`")
    answer = ask("explain", "x")
    assert (answer.code, answer.err) == (3, "error: no deployment 'x'\nhint: see `sllm status`\n")


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (EstimatorError(), ""),
        (EstimatorError(guessed=3), ""),
        (EstimatorError(count=1, p50=0.04, p95=0.04), "wrong by 4.0% (median), 4.0% (p95) in the last start\n"),
        (EstimatorError(count=37, p50=0.04, p95=0.125), "wrong by 4.0% (median), 12.5% (p95) in the last 37 starts\n"),
    ],
)
def test_status_says_how_wrong_predictions_were_once_that_is_known(ask, controller, error, note):
    controller.status = replace(controller.status, estimator=error)
    out = ask("status").out
    assert out.endswith(note)
    assert ("predicted startup times" in out) is bool(note)
    found = ask("status", "-o", "json").json["estimator"]
    assert found == {"starts": error.count, "error_p50": error.p50, "error_p95": error.p95, "guessed": error.guessed}


DRY = [["deploy", "org/demo", "--checkpoint", "m", "--dry-run"], ["scale", "org/demo", "--replicas", "2", "--dry-run"]]
each_dry_run = pytest.mark.parametrize("command", DRY, ids=["deploy", "scale"])


@each_dry_run
def test_a_dry_run_says_what_would_be_done_and_when_it_would_be_ready(ask, controller, command):
    out = ask(*command).out
    assert len(controller.asked) == 1, "nothing else was asked"
    assert [cells(line) for line in out.splitlines()[:4]] == [
        ["DEPLOYMENT", "org/demo"],
        ["revision", "4"],
        ["ready in", "1.81 s"],
        ["waits for", "waiting for a free device"],
    ]
    assert table(out, "WOULD BE STARTED")[1:] == [["node-1", "cpu-0", "1.8 s, all of it"]]
    assert table(out, "WOULD BE STOPPED")[1:] == [[ID, "org/demo", "node-1", "once revision 4 serves"]]
    assert table(out, "IF A REPLICA WERE STARTED NOW")[1][:2] == ["node-2", "~4.31 s"]


@each_dry_run
def test_a_dry_run_that_would_start_nothing_says_so(ask, controller, command):
    controller.deployment_plan = replace(controller.deployment_plan, starts=(), ready_s=None)
    assert cells(ask(*command).out.splitlines()[2]) == ["ready in", "(nothing would be started)"]


@each_dry_run
def test_a_dry_run_as_json_and_by_name(ask, command):
    data = ask(*command, "-o", "json").json
    assert list(data) == ["deployment", "revision", "ready_s", "waits_for", "starts", "stops", "candidates"]
    assert (data["revision"], data["ready_s"]) == (4, 1.8125)
    assert data["starts"][0]["estimate"]["parts"]["loading"]["seconds"] == 1.0
    assert data["stops"] == [
        {"replica": ID, "deployment": "org/demo", "node": "node-1", "why": "once revision 4 serves"}
    ]
    assert ask(*command, "-o", "name").out == "node-1\n"
