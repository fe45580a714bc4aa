"""Small worlds to simulate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import DeploymentSpec
from sllm.core.replica import ReplicaSpec
from sllm.sim.policies import ours
from sllm.sim.simulation import Simulation
from sllm.sim.spec import Arrival, Cluster, ModelSpec, NodeSpec, Timing

GB = 10**9


def node(name: str = "a", **fields: Any) -> NodeSpec:
    """1 GB/s from SSD, 10 GB/s to a device."""
    values = {"devices": 1, "device_memory_bytes": 100 * GB, "dram_bytes": 100 * GB}
    values |= {"ssd_bandwidth_bps": 1.0 * GB, "dram_bandwidth_bps": 10.0 * GB}
    return NodeSpec(**{"name": name, **values, **fields})


def model(
    name: str = "m", *, on: Any = ("a",), size_bytes: int = 10 * GB, timing: Timing | None = None, **spec: Any
) -> ModelSpec:
    """10 GB: 10 s from SSD, 1 s from DRAM. One request at a time wants a replica; it takes four."""
    checkpoint = Checkpoint(
        name=name,
        digest=f"digest-{name}",
        size_bytes=size_bytes,
        architecture="Llama",
        dtype="float16",
        tensor_count=1,
        max_model_len=2048,
        source=f"simulated:{name}",
    )
    wish = DeploymentSpec(**{"name": name, "checkpoint": name, "target_concurrency": 1, "keep_alive_s": 60.0, **spec})
    return ModelSpec(deployment=wish, checkpoint=checkpoint, nodes=tuple(on), timing=timing or Timing(token_s=1.0))


def spec(name: str, *, capacity: int = 4) -> ReplicaSpec:
    return ReplicaSpec(
        id=name,
        deployment="app",
        revision=1,
        generation=1,
        checkpoint="app",
        digest="digest-app",
        devices=("cuda-0",),
        capacity=capacity,
        max_model_len=2048,
    )


def arrivals(*rows: Any) -> list[Arrival]:
    """Rows of (time, model, seconds of service)."""
    return [
        Arrival(at=at, deployment=name, prompt_tokens=100, output_tokens=round(seconds)) for at, name, seconds in rows
    ]


def run(nodes: Any, models: Any, requests: Any, decide: Any = ours, *, seed: int = 1, **fields: Any) -> Simulation:
    thorough = fields.pop("thorough", False)
    cluster = Cluster(nodes=tuple(nodes), models=tuple(models), **fields)
    simulation = Simulation(cluster, requests, decide, seed=seed, thorough=thorough)
    simulation.run()
    return simulation


@pytest.fixture(scope="session")
def world() -> SimpleNamespace:
    return SimpleNamespace(node=node, model=model, spec=spec, arrivals=arrivals, run=run)
