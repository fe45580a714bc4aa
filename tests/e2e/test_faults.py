"""Faults: processes are killed for real; what can go on goes on, what cannot says so, nothing is orphaned."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from e2e.cluster import GRACE_S, Cluster, gone, processes_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

OPTIONS: Any = {"model": "chat", "prompt": "Python is", "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def cluster(fake_cluster: Cluster) -> Iterator[Cluster]:
    fake_cluster.cli("deploy", "chat", "--checkpoint", "demo", "--keep-alive", "10m", "--max", "2")
    yield fake_cluster
    fake_cluster.cli("delete", "chat")


def long_stream(cluster: Cluster, tokens: int) -> Iterator[Any]:
    return iter(cluster.client().completions.create(**OPTIONS, max_tokens=tokens, stream=True))


def engine_pid(cluster: Cluster, deployment: str = "chat") -> int:
    return int(cluster.until(lambda: cluster.replicas(deployment, "ready"), "a ready replica")[0]["pid"])


def rest(stream: Iterator[Any]) -> str:
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_a_stream_outlives_its_engine_which_is_replaced(cluster: Cluster) -> None:
    undisturbed = rest(long_stream(cluster, 400))
    stream = long_stream(cluster, 400)
    begun = next(stream).choices[0].text
    pid = engine_pid(cluster)
    os.kill(pid, signal.SIGKILL)
    assert begun + rest(stream) == undisturbed
    assert engine_pid(cluster) != pid


def test_a_stream_survives_the_death_of_its_agent_which_adopts_the_engine_again(cluster: Cluster) -> None:
    undisturbed = rest(long_stream(cluster, 200))
    stream = long_stream(cluster, 200)
    begun = next(stream).choices[0].text
    replica = cluster.replicas("chat", "ready")[0]
    agent = cluster.role(replica["node"])
    agent.kill()
    assert begun + rest(stream) == undisturbed
    cluster.until(lambda: cluster.restarted(replica["node"], agent), "the agent is restarted")
    again = cluster.until(lambda: cluster.replicas("chat", "ready"), "adopted")[0]
    assert (again["id"], again["pid"]) == (replica["id"], replica["pid"])


def test_a_stream_and_warm_requests_survive_the_death_of_the_controller(cluster: Cluster) -> None:
    cluster.client().completions.create(**OPTIONS, max_tokens=4)
    replica = cluster.replicas("chat", "ready")[0]
    stream = long_stream(cluster, 200)
    next(stream)
    controller = cluster.role("controller")
    controller.kill()
    assert cluster.client().completions.create(**OPTIONS, max_tokens=4).choices[0].text
    assert rest(stream)
    cluster.until(lambda: cluster.restarted("controller", controller), "the controller is restarted")
    cluster.until(
        lambda: [r["id"] for r in cluster.replicas("chat", "ready")] == [replica["id"]], "adopted, not doubled"
    )


def test_a_dead_warm_process_is_replaced_and_hurts_no_replica(cluster: Cluster) -> None:
    pid = engine_pid(cluster)
    hosts = {r["pid"] for r in cluster.json("status")["replicas"]}
    warm = [p for p in cluster.processes() if "sllm.engine.warm" in p.cmdline() and p.pid not in hosts]
    assert len(warm) == 2, "one on each node"
    for process in warm:
        process.kill()
    assert cluster.client().completions.create(**OPTIONS, max_tokens=4).choices[0].text
    assert engine_pid(cluster) == pid
    cluster.cli("scale", "chat", "--replicas", "2")
    cluster.cli("scale", "chat", "--min", "0")


def test_a_redeploy_under_load_fails_no_request(cluster: Cluster) -> None:
    def ask(_: int) -> int:
        return len(cluster.client().completions.create(**OPTIONS, max_tokens=30).choices[0].text)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, n) for n in range(40)]
        changed = ["--max-model-len", "512", "--keep-alive", "10m", "--max", "2"]
        cluster.cli("deploy", "chat", "--checkpoint", "demo", *changed)
        assert all(future.result() > 0 for future in asked)


def test_a_deployment_deleted_while_it_loads_fails_its_held_request_clearly(slow_cluster: Cluster) -> None:
    cluster = slow_cluster
    cluster.cli("deploy", "late", "--checkpoint", "demo")
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(lambda: cluster.client().completions.create(model="late", prompt="x"))
        cluster.until(lambda: cluster.replicas("late", "starting"), "loading")
        assert cluster.json("requests")[0]["state"] == "held"
        cluster.cli("delete", "late")
        with pytest.raises(openai.APIStatusError) as caught:
            held.result(timeout=30)
    assert caught.value.status_code == 404
    assert "late" in caught.value.message
    status = cluster.json("status")
    assert (status["deployments"], status["replicas"]) == ([], [])
    assert all(d["state"] == "free" for node in status["nodes"] for d in node["devices"])


def test_an_engine_that_dies_while_loading_is_retried_but_not_for_ever(slow_cluster: Cluster) -> None:
    cluster = slow_cluster
    cluster.cli("deploy", "doomed", "--checkpoint", "demo")
    killed: set[int] = set()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(lambda: cluster.client().completions.create(model="doomed", prompt="x"))
        while not held.done():
            for replica in cluster.replicas("doomed", "starting"):
                if replica["pid"] and replica["pid"] not in killed:
                    killed.add(replica["pid"])
                    os.kill(replica["pid"], signal.SIGKILL)
        with pytest.raises(openai.APIStatusError) as caught:
            held.result()
    assert len(killed) == 3
    assert caught.value.status_code == 503
    assert "signal 9" in caught.value.message
    assert cluster.deployment("doomed")["state"] == "failed"
    assert "signal 9" in cluster.deployment("doomed")["reason"]


def test_an_idle_deployment_goes_to_zero_after_its_keep_alive(cluster: Cluster) -> None:
    cluster.cli("deploy", "brief", "--checkpoint", "demo", "--keep-alive", "1s")
    cluster.client().completions.create(**{**OPTIONS, "model": "brief"}, max_tokens=4)
    cluster.until(lambda: not cluster.replicas("brief"), "at zero", timeout_s=30)
    assert cluster.deployment("brief")["state"] == "sleeping"
    cluster.client().completions.create(**{**OPTIONS, "model": "brief"}, max_tokens=4)
    cluster.cli("delete", "brief")


def test_nothing_outlives_a_killed_dev_beyond_the_grace(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, engine="fake", nodes=2)
    cluster.cli("checkpoint", "add", "demo", "examples/demo-model", "--all")
    cluster.cli("deploy", "chat", "--checkpoint", "demo", "--min", "2", "--max", "2")
    assert len(cluster.replicas("chat", "ready")) == 2
    cluster.kill()
    assert gone(cluster.home, GRACE_S + 10) == []


def test_a_clean_stop_leaves_no_process_and_exits_with_zero(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, engine="fake", nodes=1)
    cluster.cli("checkpoint", "add", "demo", "examples/demo-model")
    cluster.cli("deploy", "chat", "--checkpoint", "demo", "--min", "1")
    assert cluster.stop() == 0
    assert processes_of(cluster.home) == []
    outside = [path for path in cluster.folder.iterdir() if path.name not in ("home", "state", "dev.stderr")]
    assert outside == []
