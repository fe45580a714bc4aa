"""A stream that gives way: another model's only copy is where it runs. Real processes, the fake engine."""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster import DEMO_MODEL, Cluster, running
from e2e.operator import Operator
from e2e.streams import Answer, record

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PACE = {"SLLM_FAKE_TOKEN_S": "0.03"}
SETTINGS = ["controller.displace=true"]
BODY: dict[str, Any] = {"model": "long", "prompt": "Python is", "max_tokens": 800, "ignore_eos": True, "seed": 7}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    with running(tmp_path / "cluster", engine="fake", environment=PACE, settings=SETTINGS) as found:
        found.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        found.cli("checkpoint", "add", "scarce", str(another(tmp_path / "another")), "--node", "node-1")
        yield found


def another(folder: Path) -> Path:
    """Write a checkpoint of other content: what lies where is known by that."""
    shutil.copytree(DEMO_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


def test_a_stream_moves_for_a_model_whose_only_copy_is_there_and_its_client_does_not_notice(cluster: Cluster) -> None:
    cluster.cli("cordon", "node-2")
    cluster.cli("deploy", "long", "--checkpoint", "demo", "--min", "1", "--keep-alive", "10m")
    cluster.cli("uncordon", "node-2")
    cluster.cli("deploy", "scarce", "--checkpoint", "scarce")
    expected = record(cluster, "/completions", BODY)
    answers: list[Answer] = []
    # Its id comes from its own stream: the request before it is still listed for a while.
    ids: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        answers.append(record(cluster, "/completions", BODY, lambda request, _: ids.put(request)))

    stream = threading.Thread(target=ask)
    stream.start()
    request = ids.get(timeout=60)
    with Operator(cluster) as operator:
        cluster.until(lambda: operator.node_of(request) == "node-1", "it runs on node-1")
        answer = cluster.client().completions.create(model="scarce", prompt="Python is", max_tokens=4)
        assert answer.usage is not None
        assert stream.is_alive(), "it was answered while the other went on"
        assert operator.node_of(request) == "node-2"
        assert [r["node"] for r in cluster.replicas("scarce", "ready")] == ["node-1"]
    stream.join()
    assert answers == [expected]
    (start,) = [d for d in cluster.json("explain", "long")["decisions"] if d["node"] == "node-2"]
    assert "scarce needs its devices" in start["why"]
