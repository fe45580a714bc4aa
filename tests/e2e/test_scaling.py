"""Scaling as a user sees it: more deployments than devices, more requests than one replica takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

OPTIONS: Any = {"prompt": "Python is", "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_more_deployments_than_devices_answer_without_waiting_for_a_keep_alive(fake_cluster: Cluster) -> None:
    names = ["one", "two", "three"]
    for name in names:
        fake_cluster.cli("deploy", name, "--checkpoint", "demo", "--keep-alive", "1h")
    client = fake_cluster.client(timeout=30)
    for name in names * 2:
        assert client.completions.create(model=name, **OPTIONS, max_tokens=4).choices[0].text
    for name in names:
        fake_cluster.cli("delete", name)


def test_a_burst_starts_more_replicas_and_every_request_is_answered(fake_cluster: Cluster) -> None:
    arguments = ["--max", "2", "--target-concurrency", "4", "--keep-alive", "1h"]
    fake_cluster.cli("deploy", "busy", "--checkpoint", "demo", *arguments)

    def ask(_: int) -> int:
        answer = fake_cluster.client().completions.create(model="busy", **OPTIONS, max_tokens=100)
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(ask, range(40))) == [100] * 40
    assert len(fake_cluster.replicas("busy", "ready")) == 2
    fake_cluster.cli("delete", "busy")


def test_a_scale_to_a_number_is_reached_and_bounded_by_what_there_is(fake_cluster: Cluster) -> None:
    fake_cluster.cli("deploy", "sized", "--checkpoint", "demo")
    fake_cluster.cli("scale", "sized", "--replicas", "2")
    assert len(fake_cluster.replicas("sized", "ready")) == 2
    done = fake_cluster.cli("scale", "sized", "--replicas", "3", "--timeout", "2s", expect=124)
    assert "op-" in done.stderr
    fake_cluster.cli("scale", "sized", "--replicas", "0")
    assert fake_cluster.replicas("sized") == []
    fake_cluster.cli("delete", "sized")
