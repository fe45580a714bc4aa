"""Loading as a user meets it: damaged copies, a store process that dies, what is resident where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from e2e.cluster import DEMO_MODEL, Cluster, running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

OPTIONS: Any = {"prompt": "Python is", "temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path, engine="fake") as cluster:
        yield cluster


def partition(cluster: Cluster, node: str, checkpoint: str) -> Path:
    found = [p for p in cluster.folder.rglob("partition-000.bin") if p.parts[-2] == checkpoint and node in p.parts]
    assert len(found) == 1, found
    return found[0]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def ask(cluster: Cluster, model: str) -> str:
    return cluster.client().completions.create(model=model, **OPTIONS).choices[0].text


def states(cluster: Cluster, checkpoint: str) -> dict[str, str]:
    copies = cluster.json("checkpoint", "show", checkpoint)["copies"]
    return {copy["node"]: copy["state"] for copy in copies if copy["tier"] == "ssd"}


def test_a_damaged_copy_is_found_used_no_more_and_replaced(cluster: Cluster) -> None:
    cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
    assert "verified" in cluster.cli("checkpoint", "verify", "demo", "--deep").stdout
    flip(partition(cluster, "node-1", "demo"))
    told = cluster.cli("checkpoint", "verify", "demo", expect=2).stderr
    assert "node-1" in told
    assert "not what was written" in told
    cluster.until(lambda: states(cluster, "demo") == {"node-1": "quarantined", "node-2": "ready"}, "quarantined")
    cluster.cli("deploy", "chat", "--checkpoint", "demo")
    assert ask(cluster, "chat")
    assert [r["node"] for r in cluster.replicas("chat", "ready")] == ["node-2"]
    cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--node", "node-1")
    assert states(cluster, "demo") == {"node-1": "ready", "node-2": "ready"}
    assert "verified" in cluster.cli("checkpoint", "verify", "demo").stdout


def test_a_request_whose_only_copy_is_damaged_is_told_so(cluster: Cluster) -> None:
    cluster.cli("checkpoint", "add", "only", str(DEMO_MODEL), "--node", "node-1")
    cluster.cli("deploy", "chat", "--checkpoint", "only")
    flip(partition(cluster, "node-1", "only"))
    with pytest.raises(openai.APIStatusError) as caught:
        ask(cluster, "chat")
    assert caught.value.status_code == 503
    assert "not what was written" in caught.value.message
    with pytest.raises(openai.APIStatusError):  # at once, now that it is known
        ask(cluster, "chat")
    cluster.until(lambda: cluster.deployment("chat")["state"] == "failed", "failed")
    assert "damaged" in cluster.deployment("chat")["reason"]


def test_a_dead_store_process_is_replaced_and_hurts_nobody(cluster: Cluster) -> None:
    cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--node", "node-1")
    cluster.cli("deploy", "chat", "--checkpoint", "demo")
    undisturbed = ask(cluster, "chat")
    (before,) = store_processes(cluster, "node-1")
    before.kill()
    assert ask(cluster, "chat") == undisturbed, "what runs does not need it"
    cluster.until(lambda: [p.pid for p in store_processes(cluster, "node-1")] not in ([], [before.pid]), "replaced")
    cluster.until(lambda: dram_states(cluster) == {"ready"}, "taken over and compared with its manifest")
    cluster.cli("scale", "chat", "--replicas", "0")
    assert ask(cluster, "chat") == undisturbed


def store_processes(cluster: Cluster, node: str) -> list[psutil.Process]:
    found = [p for p in cluster.processes() if "sllm.agent.store.main" in p.cmdline()]
    return [p for p in found if node in Path(p.cwd()).parts or any(node in Path(f.path).parts for f in p.open_files())]


def dram_states(cluster: Cluster) -> set[str]:
    return {c["state"] for c in cluster.json("checkpoint", "show", "demo")["copies"] if c["tier"] == "dram"}
