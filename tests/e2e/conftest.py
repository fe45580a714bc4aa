"""Clusters for end-to-end tests: module-wide ones to share, and one of its own for a test that breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.cluster import DEMO_MODEL, Cluster, running

# The fake engine on a clock: slow enough that a fault meets a stream in the middle.
PACE = {"SLLM_FAKE_TOKEN_S": "0.01"}


# Tests kill replicas as soon as they are ready, again and again, which is not the model's fault.
KILLED_OFTEN = ("controller.stable_after_s=0",)


@pytest.fixture(scope="module")
def vllm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, the real vLLM, and the demo checkpoint on both."""
    with running(tmp_path_factory.mktemp("vllm"), engine="vllm", settings=KILLED_OFTEN) as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        yield cluster


@pytest.fixture(scope="module")
def fake_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with the fake engine, for faults: real processes, real wire, no model behind."""
    with running(tmp_path_factory.mktemp("fake"), engine="fake", environment=PACE) as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        yield cluster


@pytest.fixture
def slow_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """An engine of it takes longer to load than any test lasts."""
    with running(tmp_path, engine="fake", environment={"SLLM_FAKE_LOAD_S": "600"}) as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        yield cluster
