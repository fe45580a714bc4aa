"""Where a replica may be started: a node with free devices that holds the checkpoint.

A first rule, behind the interface that a startup-time estimate will fill: warm nodes first, then those that hold the
checkpoint in DRAM, then those with the fewest replicas, then by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sllm.core.device import Device, DeviceState
from sllm.core.ids import DeviceId, NodeName
from sllm.core.node import NodeState
from sllm.core.residency import Tier
from sllm.core.snapshot import DeploymentView, NodeView, ReplicaView, Snapshot

REFUSALS_TOLD = 4


class WaitsOn(StrEnum):
    NODES = "nodes"  # no usable node holds the checkpoint
    DEVICES = "devices"  # those that hold it have no free devices
    MEMORY = "memory"  # their devices are too small, free or not


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node that was looked at, and why it was not taken; empty for the one that was."""

    node: NodeName
    refused: str
    waits_on: WaitsOn | None = None


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
        closed = taken | view.cordon.devices
        return [d for d in view.report.devices if d.id not in closed and self._is_free(node, d)]

    def count(self, node: NodeName) -> int:
        return self._counts.get(node, 0)

    def _is_free(self, node: NodeName, device: Device) -> bool:
        return device.state is DeviceState.FREE or (
            device.state is not DeviceState.LOST and (node, device.id) in self._freed
        )


def place(room: Room, view: DeploymentView, *, only: NodeName | None = None) -> Placement | Waiting:
    """Say where a replica of the deployment would be started, within the room left by what is planned already.

    `only`: the one node that is asked about.
    """
    revision = view.current
    avoided = view.failures.nodes if view.failures else frozenset[NodeName]()
    holders = [node for node in room.holders(revision.deployment.digest) if only in (None, node.report.name)]
    refused = {node.report.name: why for node in holders if (why := _refusal(room, node, view))}
    fit = [node for node in holders if node.report.name not in refused]
    if not fit:
        return _waiting(view, _candidates(refused.values()))
    fit.sort(key=lambda node: _rank(room, node, revision.deployment.digest, avoided))
    best = fit[0]
    preferred = f"{best.report.name} is preferred"
    others = [Candidate(node=other.report.name, refused=preferred) for other in fit[1:]]
    taken = Candidate(node=best.report.name, refused="")
    devices = _usable(room, best, view)[: revision.deployment.spec.devices]
    return Placement(
        node=best.report.name,
        devices=tuple(device.id for device in devices),
        tier=best.tier_of(revision.deployment.digest) or Tier.SSD,
        candidates=_candidates([taken, *others, *refused.values()]),
    )


def refusals(candidates: Sequence[Candidate]) -> str:
    """Why nodes were not taken, in one line: of many nodes, the first."""
    lost = [candidate for candidate in candidates if candidate.refused]
    texts = [f"{candidate.node}: {candidate.refused}" for candidate in lost[:REFUSALS_TOLD]]
    if len(lost) > REFUSALS_TOLD:
        texts.append(f"and {len(lost) - REFUSALS_TOLD} more")
    return "; ".join(texts)


def device_bytes(view: DeploymentView) -> int:
    """Bytes of weights that each device of a replica takes."""
    return -(-view.current.size_bytes // view.current.deployment.spec.devices)


def _usable(room: Room, node: NodeView, view: DeploymentView) -> list[Device]:
    return [device for device in room.free(node) if device.memory_bytes >= device_bytes(view)]


def _refusal(room: Room, node: NodeView, view: DeploymentView) -> Candidate | None:
    """Why the node cannot be taken now, if so."""
    name = node.report.name
    if node.state is not NodeState.READY:
        return Candidate(node=name, refused=f"it is {node.state.value}", waits_on=WaitsOn.NODES)
    wanted, needed = view.current.deployment.spec.devices, device_bytes(view)
    usable, free = len(_usable(room, node, view)), len(room.free(node))
    if usable >= wanted:
        return None
    sizes = [device.memory_bytes for device in node.report.devices if device.state is not DeviceState.LOST]
    large = sum(size >= needed for size in sizes)
    if large < min(wanted, len(sizes)):
        text = f"{large} of {wanted} devices have the {needed} bytes that are needed, the largest has {max(sizes)}"
        return Candidate(node=name, refused=text, waits_on=WaitsOn.MEMORY)
    too_small = f", and {free - usable} with less than the {needed} bytes that are needed" if free > usable else ""
    closed = f", {len(node.cordon.devices)} cordoned" if node.cordon.devices else ""
    text = f"{usable} of {wanted} devices are free{too_small}{closed}"
    return Candidate(node=name, refused=text, waits_on=WaitsOn.DEVICES)


def _rank(room: Room, node: NodeView, digest: str, avoided: frozenset[NodeName]) -> tuple[bool, bool, int, int, str]:
    name = node.report.name
    # Waiting for a warm process costs more than any difference between tiers.
    return (name in avoided, not node.report.warm, -(node.tier_of(digest) or Tier.SSD), room.count(name), name)


def _waiting(view: DeploymentView, candidates: tuple[Candidate, ...]) -> Waiting:
    reasons = {candidate.waits_on for candidate in candidates}
    if WaitsOn.DEVICES in reasons:
        return Waiting(on=WaitsOn.DEVICES, text="waiting for a free device", candidates=candidates)
    if WaitsOn.MEMORY in reasons:
        text = f"waiting for devices with {device_bytes(view)} bytes of memory"
        return Waiting(on=WaitsOn.MEMORY, text=text, candidates=candidates)
    checkpoint = view.current.deployment.spec.checkpoint
    text = f"waiting for a ready node that holds checkpoint {checkpoint!r}"
    return Waiting(on=WaitsOn.NODES, text=text, candidates=candidates)


def _candidates(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(sorted(candidates, key=lambda candidate: candidate.node))
