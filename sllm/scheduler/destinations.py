"""Where a running request may go on: a ready replica of its revision with room, or one that is or can be started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sllm.core.decision import Candidate, WaitsOn
from sllm.core.ids import DeploymentName, DeviceId, NodeName, ReplicaId
from sllm.core.node import NodeState
from sllm.core.replica import ReplicaSpec
from sllm.core.snapshot import ReplicaView, Snapshot
from sllm.core.startup import Estimate
from sllm.scheduler.placement import Placement, place, refusals
from sllm.scheduler.room import Room


class Obstacle(StrEnum):
    """Why a request cannot go on at a node."""

    NODE = "node"  # it takes nothing new, or is not there
    CHECKPOINT = "checkpoint"  # it does not hold the checkpoint
    REVISION = "revision"  # only the current revision is started
    LIMIT = "limit"  # the deployment has as many replicas as it may have
    DEVICES = "devices"  # none is free
    MEMORY = "memory"  # its devices are too small, free or not
    ROOM = "room"  # the replicas there have all the requests that they take
    FAILED = "failed"  # it was tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    on: Obstacle
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Startable:
    """A replica of the current revision can be started there."""

    deployment: DeploymentName
    node: NodeName
    devices: tuple[DeviceId, ...]
    estimate: Estimate
    candidates: Sequence[Candidate]


Destination = ReplicaView | Startable | Refusal
"""A replica may be starting still."""


class Places:
    """How many more requests each replica takes, after what is planned and under way."""

    def __init__(self, snapshot: Snapshot, coming: Mapping[ReplicaId, int]) -> None:
        self._snapshot = snapshot
        self._taken = Counter(coming)
        self._replicas = snapshot.replicas_by_deployment()

    def peers(self, source: ReplicaView) -> list[ReplicaView]:
        """The other replicas of its revision, to which a request's tokens mean the same; the oldest first."""
        spec = source.spec
        of_deployment = self._replicas.get(spec.deployment, [])
        return [r for r in of_deployment if r.spec.id != spec.id and same_revision(r.spec, spec)]

    def left(self, replica: ReplicaView) -> int:
        name = replica.spec.id
        return replica.spec.capacity - self._snapshot.loads.get(name, 0) - self._taken[name]

    def take(self, replica: ReplicaView) -> None:
        self._taken[replica.spec.id] += 1


def elsewhere(
    snapshot: Snapshot, places: Places, source: ReplicaView, tried: frozenset[ReplicaId]
) -> ReplicaView | None:
    """The ready replica on another node, of the same revision, that has the most room; None: there is none."""
    fit = [
        r
        for r in places.peers(source)
        if r.ready and r.node != source.node and r.spec.id not in tried and _open(snapshot, r) and places.left(r) > 0
    ]
    return max(fit, key=lambda r: (places.left(r) / r.spec.capacity, r.spec.id), default=None)


def at(
    snapshot: Snapshot,
    places: Places,
    source: ReplicaView,
    node: NodeName,
    *,
    tried: frozenset[ReplicaId] = frozenset(),
    stays_busy: bool = False,
) -> Destination:
    """Where on one node a request of `source` may go on. `stays_busy`: other requests stay at the source."""
    view = snapshot.nodes.get(node)
    if view is None:
        return Refusal(on=Obstacle.NODE, text=f"there is no node {node!r}", hint="see `sllm nodes`")
    if view.state is not NodeState.READY:
        return Refusal(on=Obstacle.NODE, text=f"node {node!r} is {view.state.value}", hint="see `sllm nodes`")
    there = [r for r in places.peers(source) if r.node == node and _open(snapshot, r)]
    fit = [r for r in there if r.ready and r.spec.id not in tried and places.left(r) > 0]
    if fit:
        return max(fit, key=lambda r: (places.left(r), r.spec.id))
    starting = [r for r in there if r.starting]
    if starting:
        return starting[0]
    if any(r.spec.id in tried for r in there):
        return Refusal(on=Obstacle.FAILED, text=f"it was tried on node {node!r}")
    return _start(snapshot, places, source, node, full=[r for r in there if r.ready], stays_busy=stays_busy)


def _start(
    snapshot: Snapshot,
    places: Places,
    source: ReplicaView,
    node: NodeName,
    *,
    full: list[ReplicaView],
    stays_busy: bool,
) -> Destination:
    spec = source.spec
    deployment, view = snapshot.deployments.get(spec.deployment), snapshot.nodes[node]
    if deployment is None or not deployment.current.made(spec):
        return Refusal(
            on=Obstacle.REVISION,
            text=f"no replica of revision {spec.revision} of {spec.deployment!r} is on node {node!r}, "
            "and none is started any more",
            hint="what runs on a replaced revision ends where it is",
        )
    if deployment.current.deployment.deleting:
        return Refusal(
            on=Obstacle.REVISION, text=f"{spec.deployment!r} is being deleted: no replica of it is started any more"
        )
    if view.tier_of(spec.digest) is None:
        return Refusal(
            on=Obstacle.CHECKPOINT,
            text=f"node {node!r} does not hold checkpoint {spec.checkpoint!r}",
            hint=f"add it with `sllm checkpoint add {spec.checkpoint} SOURCE --node {node}`",
        )
    live = sum(r.live for r in (source, *places.peers(source)))
    most = deployment.current.deployment.spec.max_replicas
    if stays_busy and live >= most:
        return Refusal(
            on=Obstacle.LIMIT,
            text=f"{spec.deployment!r} has its {most} replicas, and {spec.id} has other requests that need it",
            hint=f"move all of it with `sllm migrate --replica {spec.id}`, or raise the limit with `sllm scale --max`",
        )
    placement = place(Room(snapshot), deployment, only=node)
    if isinstance(placement, Placement):
        return Startable(
            deployment=spec.deployment,
            node=node,
            devices=placement.devices,
            estimate=placement.estimate,
            candidates=placement.candidates,
        )
    if full:
        text = f"{full[0].spec.id} on node {node!r} has no room"
        return Refusal(on=Obstacle.ROOM, text=text, hint="wait until requests there have ended")
    on = Obstacle.MEMORY if placement.on is WaitsOn.MEMORY else Obstacle.DEVICES
    return Refusal(
        on=on,
        text=f"no replica of {spec.deployment!r} can be started on node {node!r}: {refusals(placement.candidates)}",
        hint="see `sllm nodes`",
    )


def same_revision(one: ReplicaSpec, other: ReplicaSpec) -> bool:
    """True if, of one deployment, a request's tokens mean the same to both."""
    return (one.revision, one.digest) == (other.revision, other.digest)


def _open(snapshot: Snapshot, replica: ReplicaView) -> bool:
    view = snapshot.nodes.get(replica.node)
    return view is not None and view.state is NodeState.READY and view.cordon.devices.isdisjoint(replica.spec.devices)
