"""What a node reports of itself. Pure: values in, a NodeReport out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import DeviceId, NodeName, ReplicaId
from sllm.core.launch import WarmReady
from sllm.core.node import LoadReport, NodeReport
from sllm.core.replica import ReplicaState, ReplicaStatus
from sllm.core.residency import Residency, ResidencyState, Tier, TierUsage
from sllm.loader.store import StoredCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What does not change while an agent runs."""

    name: NodeName
    incarnation: str
    address: str
    version: str
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InMemory:
    """A checkpoint in the DRAM pool."""

    digest: str
    size_bytes: int
    ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything there is to report at one moment."""

    revision: int
    warm: WarmReady | None
    devices: tuple[Device, ...]
    holders: Mapping[DeviceId, ReplicaId]
    stored: tuple[StoredCheckpoint, ...]
    damaged: tuple[StoredCheckpoint, ...]  # of those on SSD, none of `stored`
    in_memory: tuple[InMemory, ...]
    replicas: tuple[ReplicaStatus, ...]
    ssd: TierUsage
    dram: TierUsage
    loads: tuple[LoadReport, ...] = ()
    probe: LoadReport | None = None


def report(identity: Identity, facts: Facts) -> NodeReport:
    """Build the report of a node."""
    warm = facts.warm
    on_devices = _on_devices(facts)
    device_bytes = sum(device.memory_bytes for device in facts.devices)
    used_bytes = sum(residency.size_bytes for residency in on_devices)
    return NodeReport(
        name=identity.name,
        incarnation=identity.incarnation,
        revision=facts.revision,
        address=identity.address,
        version=identity.version,
        engine=f"{warm.engine} {warm.version}" if warm else identity.engine,
        warm=warm is not None,
        devices=tuple(_leased(device, facts) for device in facts.devices),
        tiers=(facts.ssd, facts.dram, TierUsage(tier=Tier.DEVICE, capacity_bytes=device_bytes, used_bytes=used_bytes)),
        residencies=(*_on_ssd(facts), *_in_dram(facts), *on_devices),
        checkpoints=tuple(entry.checkpoint for entry in (*facts.stored, *facts.damaged)),
        replicas=facts.replicas,
        architectures=warm.architectures if warm else (),
        loads=facts.loads,
        probe=facts.probe,
    )


def _leased(device: Device, facts: Facts) -> Device:
    holder = facts.holders.get(device.id)
    if holder is None or device.state is DeviceState.LOST:
        return device
    used_bytes = device.memory_used_bytes
    if device.kind is DeviceKind.CPU:  # nobody else can tell what a slot's memory is used for
        used_bytes = sum(status.memory_bytes for status in facts.replicas if status.spec.id == holder)
    return replace(device, state=DeviceState.LEASED, memory_used_bytes=used_bytes)


def _on_ssd(facts: Facts) -> Iterable[Residency]:
    for entry in facts.stored:
        yield _residency(entry, Tier.SSD, ResidencyState.READY)
    for entry in facts.damaged:
        yield _residency(entry, Tier.SSD, ResidencyState.QUARANTINED)


def _in_dram(facts: Facts) -> Iterable[Residency]:
    by_digest = {held.digest: held for held in facts.in_memory}
    for entry in facts.stored:
        held = by_digest.get(entry.checkpoint.digest)
        if held is not None:
            yield _residency(entry, Tier.DRAM, ResidencyState.READY if held.ready else ResidencyState.LOADING)


def _on_devices(facts: Facts) -> list[Residency]:
    serving = (ReplicaState.READY, ReplicaState.DRAINING)
    digests = [status.spec.digest for status in facts.replicas if status.state in serving]
    by_digest = {entry.checkpoint.digest: entry for entry in facts.stored}
    return [
        _residency(by_digest[digest], Tier.DEVICE, ResidencyState.READY) for digest in digests if digest in by_digest
    ]


def _residency(entry: StoredCheckpoint, tier: Tier, state: ResidencyState) -> Residency:
    return Residency(
        checkpoint=entry.checkpoint.name,
        digest=entry.checkpoint.digest,
        tier=tier,
        state=state,
        size_bytes=entry.checkpoint.size_bytes,
    )
