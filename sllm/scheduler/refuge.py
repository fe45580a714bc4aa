"""Refuge: where the requests of a replica that gives way go on, with the room and the devices reserved for them. Pure.

Other ready replicas of its revision with room for all of them, else a start on free devices of a node that holds the
checkpoint, whose own load costs what it costs. Never on the node where the devices are to become free.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sllm.core.ids import DeviceId, NodeName, ReplicaId
from sllm.core.migration import Outlook
from sllm.core.node import NodeState
from sllm.core.priority import Priority
from sllm.core.snapshot import DeploymentView, NodeView, ReplicaView, Snapshot
from sllm.core.startup import Estimate
from sllm.scheduler.destinations import same_revision
from sllm.scheduler.placement import avoided, startup, usable
from sllm.scheduler.room import Room

CONCURRENCY = 4  # requests of one source that move at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """What refuges have taken: devices, room at replicas (requests), and turns in loading queues (bytes)."""

    devices: frozenset[tuple[NodeName, DeviceId]] = frozenset()
    room: Mapping[ReplicaId, int] = field(default_factory=dict)
    behind_bytes: Mapping[NodeName, int] = field(default_factory=dict)


NOTHING_RESERVED: Final = Reserved()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A replica that is to be started for what is moved."""

    view: DeploymentView
    node: NodeName
    devices: tuple[DeviceId, ...]
    estimate: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuge:
    """`nodes` are where the requests go on. `empty_s`: when the last of them has left its replica, or has ended there.
    `pause_s`: what their clients wait for it, all together. `reserved` is what is taken, with what was before it."""

    nodes: tuple[NodeName, ...]
    empty_s: float
    pause_s: float
    reserved: Reserved
    start: Start | None = None


def refuge(snapshot: Snapshot, room: Room, source: ReplicaView, reserved: Reserved) -> Refuge | None:
    """Where what runs on `source` can go on, the soonest; None: nowhere."""
    running = list(snapshot.running.get(source.spec.id, {}).values())
    return _beside(snapshot, room, source, running, reserved) or _anew(snapshot, room, source, running, reserved)


def emptied_s(running: Iterable[Outlook], ready_s: float) -> tuple[float, float]:
    """When a source has none of these requests any more, if moving begins after `ready_s`, and what their clients wait
    for that. Who ends before it has moved, does so; CONCURRENCY move at once, those first that run on longest."""
    last_s = pause_s = 0.0
    free = [ready_s] * CONCURRENCY
    for outlook in sorted(running, key=lambda o: -_left(o)):
        moved_s = free[0] + outlook.move_s
        if _left(outlook) <= moved_s:
            last_s = max(last_s, _left(outlook))
            continue
        heapq.heapreplace(free, moved_s)
        last_s = max(last_s, moved_s)
        pause_s += outlook.pause_s
    return last_s, pause_s


def _left(outlook: Outlook) -> float:
    return float("inf") if outlook.left_s is None else outlook.left_s


def _beside(
    snapshot: Snapshot, room: Room, source: ReplicaView, running: Sequence[Outlook], reserved: Reserved
) -> Refuge | None:
    """At ready replicas of its revision on other nodes, if they have room for all of it."""
    left, taken, nodes = len(running), dict(reserved.room), []
    for peer in _peers(snapshot, room, source):
        name = peer.spec.id
        fit = peer.spec.capacity - snapshot.loads.get(name, 0) - taken.get(name, 0)
        if left and fit > 0:
            taken[name] = taken.get(name, 0) + min(fit, left)
            left -= min(fit, left)
            nodes.append(peer.node)
    if left:
        return None
    empty_s, pause_s = emptied_s(running, 0.0)
    after = replace(reserved, room=taken)
    return Refuge(nodes=tuple(dict.fromkeys(nodes)), empty_s=empty_s, pause_s=pause_s, reserved=after)


def _peers(snapshot: Snapshot, room: Room, source: ReplicaView) -> list[ReplicaView]:
    """Those with the most room first."""

    def fits(peer: ReplicaView) -> bool:
        node = snapshot.nodes.get(peer.node)
        open_there = node is not None and node.state is NodeState.READY
        return peer.ready and peer.node != source.node and open_there and same_revision(peer.spec, source.spec)

    peers = [peer for peer in room.index.of_deployment.get(source.spec.deployment, ()) if fits(peer)]
    return sorted(peers, key=lambda p: (snapshot.loads.get(p.spec.id, 0), p.spec.id))


def _anew(
    snapshot: Snapshot, room: Room, source: ReplicaView, running: Sequence[Outlook], reserved: Reserved
) -> Refuge | None:
    """At a replica that is started for it, where that is ready first."""
    view = snapshot.deployments.get(source.spec.deployment)
    if view is None or not view.current.made(source.spec) or view.failures is not None:
        return None
    found = [
        _start(room, node, view, reserved)
        for node in room.holders(source.spec.digest)
        if node.report.name != source.node
    ]
    starts = [start for start in found if start is not None]
    if not starts:
        return None
    best = min(starts, key=lambda start: (start.estimate.total_s, room.count(start.node), start.node))
    empty_s, pause_s = emptied_s(running, best.estimate.total_s)
    behind = dict(reserved.behind_bytes)
    if best.estimate.size_bytes:
        behind[best.node] = behind.get(best.node, 0) + best.estimate.size_bytes
    after = replace(
        reserved,
        devices=reserved.devices | {(best.node, device) for device in best.devices},
        behind_bytes=behind,
    )
    return Refuge(nodes=(best.node,), empty_s=empty_s, pause_s=pause_s, reserved=after, start=best)


def _start(room: Room, node: NodeView, view: DeploymentView, reserved: Reserved) -> Start | None:
    name, wanted = node.report.name, view.current.deployment.spec.devices
    if node.state is not NodeState.READY or avoided(node, view):
        return None
    free = [device for device in usable(room, node, view) if (name, device.id) not in reserved.devices]
    if len(free) < wanted:
        return None
    behind_bytes = reserved.behind_bytes.get(name, 0)
    estimate = startup(room, node, view, free[0].kind, Priority.REQUEST, behind_bytes=behind_bytes)
    return Start(view=view, node=name, devices=tuple(d.id for d in free[:wanted]), estimate=estimate)
