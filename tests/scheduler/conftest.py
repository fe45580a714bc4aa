"""Small worlds for the pure decisions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.node import NodeReport, NodeState
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus
from sllm.core.residency import Residency, ResidencyState, Tier
from sllm.core.snapshot import (
    Command,
    DeploymentView,
    Held,
    Intent,
    NodeView,
    Policy,
    ReplicaView,
    Revision,
    Snapshot,
)

GIB = 1 << 30


def device(name: str, state: DeviceState = DeviceState.FREE, memory_bytes: int = GIB) -> Device:
    return Device(id=name, kind=DeviceKind.CPU, state=state, memory_bytes=memory_bytes)


def residency(digest: str, tier: Tier = Tier.SSD, state: ResidencyState = ResidencyState.READY) -> Residency:
    return Residency(checkpoint=digest, digest=digest, tier=tier, state=state, size_bytes=100)


def checkpoint(name: str = "m", **fields: Any) -> Checkpoint:
    values = {"digest": name, "size_bytes": 100, "architecture": "Llama", "dtype": "float32"}
    values |= {"tensor_count": 1, "max_model_len": 64}
    return Checkpoint(name=name, **{**values, **fields})


def node(
    name: str,
    *,
    devices: Any = ("d0",),
    holds: Any = (("m", Tier.SSD),),
    state: NodeState = NodeState.READY,
    seen_at: float = 0.0,
    warm: bool = True,
) -> NodeView:
    """`devices` are ids or Devices; `holds` are (digest, tier); DRAM implies a copy on SSD."""
    residencies = [residency(d, t) for d, t in holds] + [residency(d) for d, t in holds if t is not Tier.SSD]
    report = NodeReport(
        name=name,
        incarnation=f"{name}-1",
        revision=1,
        address=f"{name}:1",
        version="0",
        engine="fake",
        warm=warm,
        devices=tuple(d if isinstance(d, Device) else device(d) for d in devices),
        residencies=tuple(residencies),
        checkpoints=tuple(checkpoint(d) for d, _ in holds),
    )
    return NodeView(report=report, state=state, seen_at=seen_at, last_seen=0.0)


def revision(name: str = "app", number: int = 1, digest: str = "m", deleting: bool = False, **spec: Any) -> Revision:
    wish = DeploymentSpec(**{"name": name, "checkpoint": "m", **spec})
    made = Deployment(spec=wish, revision=number, digest=digest, created_at=0, updated_at=0, deleting=deleting)
    return Revision(deployment=made, max_model_len=64, size_bytes=100)


def deployment(name: str = "app", *, needed: int = 0, needed_at: Any = (), **fields: Any) -> DeploymentView:
    return DeploymentView(current=revision(name, **fields), needed=needed, needed_at=tuple(needed_at))


def replica(
    name: str,
    *,
    on: str = "a",
    deployment: str = "app",
    revision: int = 1,
    state: ReplicaState | None = ReplicaState.READY,
    intent: Intent = Intent.RUN,
    devices: Any = ("d0",),
    generation: int = 1,
    command: Command = Command.DONE,
    priority: Priority = Priority.REQUEST,
    retry_at: float = 0.0,
) -> ReplicaView:
    """`state` None: it has not been reported yet."""
    spec = ReplicaSpec(
        id=f"rep-{name}",
        deployment=deployment,
        revision=revision,
        generation=generation,
        checkpoint="m",
        digest="m",
        devices=tuple(devices),
        capacity=32,
        max_model_len=64,
    )
    status = ReplicaStatus(spec=spec, state=state, address=f"{on}:2") if state else None
    return ReplicaView(
        spec=spec, node=on, intent=intent, command=command, priority=priority, retry_at=retry_at, status=status
    )


def snapshot(
    *,
    nodes: Any = (),
    replicas: Any = (),
    deployments: Any = (),
    held: Any = None,
    loads: Any = None,
    **fields: Any,
) -> Snapshot:
    """`held` is {deployment: count}; `loads` is {"rep-x": count}."""
    return Snapshot(
        policy=Policy(),
        nodes={view.report.name: view for view in nodes},
        replicas={view.spec.id: view for view in replicas},
        deployments={view.name: view for view in deployments},
        loads=loads or {},
        held={name: Held(count=count, since=0.0) for name, count in (held or {}).items()},
        **fields,
    )


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Builders of the values that decisions are made from."""
    return SimpleNamespace(
        device=device,
        node=node,
        revision=revision,
        deployment=deployment,
        replica=replica,
        snapshot=snapshot,
        residency=residency,
        checkpoint=checkpoint,
    )
