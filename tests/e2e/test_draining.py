"""Nodes that are closed and emptied under streams, with real processes and the fake engine."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from e2e.cluster import Cluster
from e2e.operator import Operator
from e2e.streams import Answer, record

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

BODY: dict[str, Any] = {"model": "drained", "prompt": "Python is", "max_tokens": 2500, "ignore_eos": True, "seed": 7}


def state(cluster: Cluster, name: str) -> str | None:
    """Of a node; None: the controller has not heard of it yet."""
    return next((n["state"] for n in cluster.json("nodes") if n["name"] == name), None)


def test_a_drain_goes_on_after_the_controller_died_and_the_stream_does_not_notice(fake_cluster: Cluster) -> None:
    cluster = fake_cluster
    cluster.cli("deploy", "drained", "--checkpoint", "demo", "--min", "1", "--keep-alive", "10m")
    expected = record(cluster, "/completions", BODY)
    (replica,) = cluster.replicas("drained", "ready")
    source = replica["node"]
    (other,) = [n["name"] for n in cluster.json("nodes") if n["name"] != source]
    cluster.cli("cordon", other)
    answers: list[Answer] = []
    stream = threading.Thread(target=lambda: answers.append(record(cluster, "/completions", BODY)))
    stream.start()
    with Operator(cluster) as operator:
        cluster.until(lambda: operator.running("drained"), "it runs")
    under_way = cluster.cli("drain", source, "--deadline", "5m", "--no-wait")
    assert "is under way as op-" in under_way.stdout
    assert state(cluster, source) == "draining"
    controller = cluster.role("controller")
    controller.kill()
    cluster.until(lambda: cluster.restarted("controller", controller), "another controller")
    cluster.until(lambda: state(cluster, source) == "draining", "it drains still")
    cluster.cli("uncordon", other)
    assert stream.is_alive(), "what is left waits for room elsewhere"
    cluster.until(lambda: state(cluster, source) == "cordoned", "it is drained", timeout_s=60)
    assert [r["node"] for r in cluster.json("status")["replicas"]] == [other]
    stream.join()
    assert answers == [expected]
    cluster.cli("uncordon", source)
    assert state(cluster, source) == "ready"
    cluster.cli("delete", "drained")
