"""Clusters for end-to-end tests: module-wide ones to share, and one of its own for a test that breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.cluster import DEMO_MODEL, Cluster, running


@pytest.fixture(scope="module")
def vllm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, the real vLLM, and the demo checkpoint on both."""
    with running(tmp_path_factory.mktemp("vllm"), engine="vllm") as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        yield cluster


@pytest.fixture(scope="module")
def fake_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with the fake engine, for faults: real processes, real wire, no model behind."""
    with running(tmp_path_factory.mktemp("fake"), engine="fake") as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        yield cluster


@pytest.fixture
def own_fake_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster for one test only, which may break it."""
    with running(tmp_path, engine="fake") as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        yield cluster
