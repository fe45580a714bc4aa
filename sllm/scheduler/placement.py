"""Where a replica may be started: a node with free devices that holds the checkpoint.

A first rule, behind the interface that a startup-time estimate will fill: warm nodes first, then those that hold the
checkpoint in DRAM, then those with the fewest replicas, then by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from sllm.core.device import Device, DeviceState
from sllm.core.ids import DeploymentName, DeviceId, NodeName
from sllm.core.node import NodeState
from sllm.core.residency import Tier
from sllm.core.snapshot import DeploymentView, NodeView, ReplicaView, Snapshot


class WaitsOn(StrEnum):
    NODES = "nodes"  # no usable node holds the checkpoint
    DEVICES = "devices"  # those that hold it have no free devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node that was looked at, and why it was not taken; empty for the one that was."""

    node: NodeName
    refused: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    node: NodeName
    devices: tuple[DeviceId, ...]
    tier: Tier
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Nothing can be started now."""

    on: WaitsOn
    text: str
    candidates: tuple[Candidate, ...]


class Room:
    """Free devices and replica counts per node, as they would be after what was planned so far."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._nodes = snapshot.nodes
        self._taken: dict[NodeName, frozenset[DeviceId]] = {}
        self._counts: dict[NodeName, int] = {}
        self._holders: dict[str, list[NodeView]] | None = None
        self._freed: frozenset[tuple[NodeName, DeviceId]] = frozenset()
        for replica in snapshot.replicas.values():
            self.take(replica.node, replica.spec.devices)

    def take(self, node: NodeName, devices: Iterable[DeviceId]) -> None:
        self._taken[node] = self._taken.get(node, frozenset()) | frozenset(devices)
        self._counts[node] = self._counts.get(node, 0) + 1

    def without(self, replicas: Iterable[ReplicaView]) -> Room:
        """The room there would be if these replicas had gone."""
        other = object.__new__(Room)
        other._nodes, other._holders = self._nodes, self._holders
        other._taken, other._counts = dict(self._taken), dict(self._counts)
        other._freed = self._freed
        for replica in replicas:
            other._taken[replica.node] -= frozenset(replica.spec.devices)
            other._counts[replica.node] -= 1
            other._freed |= {(replica.node, device) for device in replica.spec.devices}
        return other

    def holders(self, digest: str) -> list[NodeView]:
        """Nodes with a copy at rest."""
        if self._holders is None:
            self._holders = {}
            for view in self._nodes.values():
                for held in {r.digest for r in view.report.residencies}:
                    self._holders.setdefault(held, []).append(view)
        return [view for view in self._holders.get(digest, []) if view.tier_of(digest) is not None]

    def free(self, view: NodeView) -> list[Device]:
        node = view.report.name
        taken = self._taken.get(node, frozenset())
        return [d for d in view.report.devices if d.id not in taken and self._is_free(node, d)]

    def count(self, node: NodeName) -> int:
        return self._counts.get(node, 0)

    def _is_free(self, node: NodeName, device: Device) -> bool:
        return device.state is DeviceState.FREE or (
            device.state is not DeviceState.LOST and (node, device.id) in self._freed
        )


def place(snapshot: Snapshot, deployment: DeploymentName, now: float) -> Placement | Waiting:
    """Say where a replica of the deployment would be started, as the snapshot is."""
    del now  # a rule that prices waiting will need it
    return place_in(Room(snapshot), snapshot.deployments[deployment])


def place_in(room: Room, view: DeploymentView) -> Placement | Waiting:
    """As `place`, within the room left by what is planned already."""
    revision = view.current
    avoided = view.failures.nodes if view.failures else frozenset[NodeName]()
    holders = room.holders(revision.deployment.digest)
    refusals = {node.report.name: _refusal(room, node, view) for node in holders}
    fit = [node for node in holders if not refusals[node.report.name]]
    if not fit:
        return _waiting(view, refusals)
    fit.sort(key=lambda node: _rank(room, node, revision.deployment.digest, avoided))
    best = fit[0]
    for other in fit[1:]:
        refusals[other.report.name] = f"{best.report.name} is preferred"
    devices = _usable(room, best, view)[: revision.deployment.spec.devices]
    return Placement(
        node=best.report.name,
        devices=tuple(device.id for device in devices),
        tier=best.tier_of(revision.deployment.digest) or Tier.SSD,
        candidates=_candidates(refusals),
    )


def device_bytes(view: DeploymentView) -> int:
    """Bytes of weights that each device of a replica takes."""
    return -(-view.current.size_bytes // view.current.deployment.spec.devices)


def _usable(room: Room, node: NodeView, view: DeploymentView) -> list[Device]:
    return [device for device in room.free(node) if device.memory_bytes >= device_bytes(view)]


def _refusal(room: Room, node: NodeView, view: DeploymentView) -> str:
    if node.state is not NodeState.READY:
        return f"it is {node.state.value}"
    wanted, usable = view.current.deployment.spec.devices, len(_usable(room, node, view))
    if usable < wanted:
        return f"{usable} of {wanted} devices are free"
    return ""


def _rank(room: Room, node: NodeView, digest: str, avoided: frozenset[NodeName]) -> tuple[bool, bool, int, int, str]:
    name = node.report.name
    # Waiting for a warm process costs more than any difference between tiers.
    return (name in avoided, not node.report.warm, -(node.tier_of(digest) or Tier.SSD), room.count(name), name)


def _waiting(view: DeploymentView, refusals: dict[NodeName, str]) -> Waiting:
    candidates = _candidates(refusals)
    if any("devices" in refused for refused in refusals.values()):
        return Waiting(on=WaitsOn.DEVICES, text="waiting for a free device", candidates=candidates)
    checkpoint = view.current.deployment.spec.checkpoint
    text = f"waiting for a ready node that holds checkpoint {checkpoint!r}"
    return Waiting(on=WaitsOn.NODES, text=text, candidates=candidates)


def _candidates(refusals: dict[NodeName, str]) -> tuple[Candidate, ...]:
    return tuple(Candidate(node=node, refused=refused) for node, refused in sorted(refusals.items()))
