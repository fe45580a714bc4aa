"""What a node reports."""

from __future__ import annotations

from typing import Any

from sllm.agent.inventory import Facts, Identity, InMemory, report
from sllm.core.checkpoint import Checkpoint
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, NodeName, ReplicaId
from sllm.core.launch import WarmReady
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus
from sllm.core.residency import ResidencyState, Tier, TierUsage
from sllm.loader.format import Manifest
from sllm.loader.store import StoredCheckpoint

IDENTITY = Identity(name=NodeName("n"), incarnation="i", address="a:1", version="0", engine="vllm")
CPU, GPU = DeviceId("cpu-0"), DeviceId("GPU-1")
HOLDER = ReplicaId("rep-1")


def entry(name: str, digest: str) -> StoredCheckpoint:
    checkpoint = Checkpoint(
        name=CheckpointName(name),
        digest=digest,
        size_bytes=10,
        architecture="X",
        dtype="float32",
        tensor_count=1,
        max_model_len=8,
    )
    return StoredCheckpoint(checkpoint=checkpoint, manifest=Manifest(partitions=(), tensors={}, chunk_bytes=1 << 20))


def device(id: DeviceId, kind: DeviceKind, **changes: Any) -> Device:  # noqa: A002
    return Device(id=id, kind=kind, memory_bytes=100, **{"state": DeviceState.FREE, **changes})


def replica(state: ReplicaState = ReplicaState.READY, digest: str = "d1") -> ReplicaStatus:
    spec = ReplicaSpec(
        id=HOLDER,
        deployment=DeploymentName("story"),
        revision=1,
        generation=1,
        checkpoint=CheckpointName("demo"),
        digest=digest,
        devices=(CPU,),
        capacity=1,
        max_model_len=1,
    )
    return ReplicaStatus(spec=spec, state=state, memory_bytes=42)


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = {
        "revision": 3,
        "warm": None,
        "devices": (),
        "holders": {},
        "stored": (),
        "damaged": (),
        "in_memory": (),
        "replicas": (),
        "ssd": TierUsage(tier=Tier.SSD, capacity_bytes=1000, used_bytes=10),
        "dram": TierUsage(tier=Tier.DRAM, capacity_bytes=500, used_bytes=10),
    }
    return Facts(**{**values, **changes})


def test_a_node_whose_engine_is_not_warm_yet_says_so() -> None:
    cold = report(IDENTITY, facts())
    assert (cold.warm, cold.engine, cold.architectures, cold.revision) == (False, "vllm", (), 3)
    warm = report(IDENTITY, facts(warm=WarmReady(engine="vllm", version="0.32", seconds=1.0, architectures=("X",))))
    assert (warm.warm, warm.engine, warm.architectures) == (True, "vllm 0.32", ("X",))


def test_leased_devices_are_leased_and_a_slots_memory_is_its_replicas() -> None:
    devices = (device(CPU, DeviceKind.CPU), device(GPU, DeviceKind.CUDA, memory_used_bytes=7))
    made = report(IDENTITY, facts(devices=devices, holders={CPU: HOLDER, GPU: HOLDER}, replicas=(replica(),)))
    assert [(d.state, d.memory_used_bytes) for d in made.devices] == [(DeviceState.LEASED, 42), (DeviceState.LEASED, 7)]


def test_a_lost_device_stays_lost() -> None:
    lost = device(GPU, DeviceKind.CUDA, state=DeviceState.LOST)
    assert report(IDENTITY, facts(devices=(lost,), holders={GPU: HOLDER})).devices == (lost,)


def test_a_checkpoint_resides_where_its_bytes_are() -> None:
    made = report(
        IDENTITY,
        facts(
            devices=(device(CPU, DeviceKind.CPU),),
            stored=(entry("demo", "d1"), entry("other", "d2"), entry("cold", "d3")),
            in_memory=(
                InMemory(digest="d1", size_bytes=64, ready=True),
                InMemory(digest="d2", size_bytes=64, ready=False),
            ),
            replicas=(replica(), replica(ReplicaState.STARTING, "d2"), replica(digest="removed")),
        ),
    )
    assert {(r.checkpoint, r.tier, r.state) for r in made.residencies} == {
        ("demo", Tier.SSD, ResidencyState.READY),
        ("other", Tier.SSD, ResidencyState.READY),
        ("cold", Tier.SSD, ResidencyState.READY),
        ("demo", Tier.DRAM, ResidencyState.READY),
        ("other", Tier.DRAM, ResidencyState.LOADING),
        ("demo", Tier.DEVICE, ResidencyState.READY),
    }
    assert made.tiers[-1] == TierUsage(tier=Tier.DEVICE, capacity_bytes=100, used_bytes=10)
    assert [checkpoint.name for checkpoint in made.checkpoints] == ["demo", "other", "cold"]


def test_a_damaged_copy_is_in_quarantine_on_every_tier() -> None:
    held = InMemory(digest="d1", size_bytes=64, ready=True)
    made = report(IDENTITY, facts(damaged=(entry("demo", "d1"),), in_memory=(held,)))
    assert [(r.tier, r.state) for r in made.residencies] == [(Tier.SSD, ResidencyState.QUARANTINED)]
    assert [checkpoint.name for checkpoint in made.checkpoints] == ["demo"]
