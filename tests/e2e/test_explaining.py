"""Why a start took what it took, as a user asks: of real processes, with the fake engine."""

from __future__ import annotations

import pytest
from e2e.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PHASES = {"queued", "forking", "building"}


def test_a_request_can_be_traced_to_the_start_that_it_waited_for(fake_cluster: Cluster) -> None:
    fake_cluster.cli("deploy", "asked", "--checkpoint", "demo", "--keep-alive", "1h")
    client = fake_cluster.client()
    answer = client.completions.with_raw_response.create(model="asked", prompt="Python is", max_tokens=4)
    told = fake_cluster.json("explain", answer.headers["x-request-id"])
    assert told["deployment"] == "asked"
    assert told["held_at"] < told["granted_at"]
    (decision,) = told["decisions"]
    assert decision["priority"] == "request"
    assert decision["phases_s"].keys() >= PHASES
    assert decision["measured_s"] == pytest.approx(sum(decision["phases_s"].values()))
    assert {candidate["node"] for candidate in decision["candidates"]} == {"node-1", "node-2"}
    out = fake_cluster.cli("explain", decision["replica"]).stdout
    assert "PREDICTED" in out
    assert "█" in out
    fake_cluster.cli("delete", "asked")


def test_predictions_come_from_what_was_measured_and_their_error_is_told(fake_cluster: Cluster) -> None:
    fake_cluster.cli("deploy", "again", "--checkpoint", "demo")
    before = fake_cluster.json("status")["estimator"]["starts"]
    for _ in range(3):
        fake_cluster.cli("scale", "again", "--replicas", "1")
        fake_cluster.cli("scale", "again", "--replicas", "0")
    planned = fake_cluster.json("scale", "again", "--replicas", "1", "--dry-run")
    assert planned["starts"][0]["estimate"]["guessed"] is False
    assert planned["ready_s"] == planned["starts"][0]["estimate"]["total_s"] > 0
    estimator = fake_cluster.json("status")["estimator"]
    assert estimator["starts"] >= before + 2, "only the first of all can have been a guess"
    assert estimator["error_p50"] <= estimator["error_p95"]
    newest = fake_cluster.json("explain", "again")["decisions"][0]
    assert newest["estimate"]["parts"]["building"]["basis"] == "measured"
    fake_cluster.cli("delete", "again")
