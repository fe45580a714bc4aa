"""A live cluster's decisions, made again from what was recorded of them, in another process; with the fake engine."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from e2e.cluster import DEMO_MODEL, running

from sllm.sim.policies import ours
from sllm.sim.replay import differences, read_record

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

MODELS = ("red", "green", "blue")


def test_what_a_live_cluster_decided_is_decided_again_exactly(tmp_path):
    record = tmp_path / "plans.jsonl"
    environment = {"SLLM_FAKE_TOKEN_S": "0.005"}
    with running(
        tmp_path, engine="fake", environment=environment, settings=(f"controller.record={record}",)
    ) as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        for name in MODELS:
            cluster.cli("deploy", name, "--checkpoint", "demo", "--keep-alive", "1s", "--target-concurrency", "1")
        client = cluster.client()

        def ask(name: str) -> None:
            messages = [{"role": "user", "content": "hello"}]
            for _ in range(4):
                client.chat.completions.create(model=name, messages=messages, max_tokens=20)

        asking = [threading.Thread(target=ask, args=(name,)) for name in MODELS for _ in range(2)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        for name in MODELS:
            cluster.until(lambda name=name: not cluster.replicas(name), f"{name} is let go")
    records = list(read_record(record))
    decided = Counter(action["is"] for found in records for action in found.plan["actions"])
    assert decided["StartReplica"] >= len(MODELS)
    assert decided["DrainReplica"] >= len(MODELS)
    assert [found.line for found, _ in differences(record, ours)] == []
