"""The loading queues of nodes, as the starts under way make them: what is read before a new load's turn comes. Pure.

A node reads one checkpoint at a time, the better priority first (docs/architecture.md). What its agent prefetches by
itself is not counted: it gives way to every start.
"""

from __future__ import annotations

from dataclasses import dataclass

from sllm.core.ids import NodeName
from sllm.core.priority import Priority
from sllm.core.replica import StartPhase
from sllm.core.snapshot import NodeView, ReplicaView, Snapshot
from sllm.core.startup import Learnt

_READ = (StartPhase.BUILDING, StartPhase.READY)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """Bytes of one checkpoint that are still to come on a node; `number` says who came first among equals."""

    left_bytes: int
    priority: Priority
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a new start would have to read, and what is read before that."""

    size_bytes: int
    ahead_bytes: int


class LoadingQueues:
    """As they would be after what was planned so far."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._learnt = snapshot.learnt
        self._loads: dict[NodeName, dict[str, _Load]] = {}
        self._last = max((replica.spec.generation for replica in snapshot.replicas.values()), default=0)
        for replica in snapshot.replicas.values():
            node = snapshot.nodes.get(replica.node)
            if node is not None and replica.starting:
                self._under_way(node, replica)

    def add(self, node: NodeView, digest: str, priority: Priority) -> None:
        """A start is planned there."""
        if not node.in_memory(digest):
            self._last += 1
            load = _Load(left_bytes=load_bytes(self._learnt, node, digest), priority=priority, number=self._last)
            self._put(node.report.name, digest, load)

    def turn(self, node: NodeView, digest: str, priority: Priority) -> Turn:
        """Who needs what is loaded already waits for that load, which it may raise."""
        if node.in_memory(digest):
            return Turn(size_bytes=0, ahead_bytes=0)
        loads = self._loads.get(node.report.name, {})
        own = loads.get(digest)
        mine = (min(own.priority, priority), own.number) if own else (priority, self._last + 1)
        ahead = sum(o.left_bytes for d, o in loads.items() if d != digest and (o.priority, o.number) < mine)
        left_bytes = own.left_bytes if own else load_bytes(self._learnt, node, digest)
        return Turn(size_bytes=left_bytes, ahead_bytes=ahead)

    def _under_way(self, node: NodeView, replica: ReplicaView) -> None:
        status, digest = replica.status, replica.spec.digest
        if node.in_memory(digest) or (status is not None and status.phase in _READ):
            return
        there = status.progress if status is not None and status.phase is StartPhase.LOADING else 0.0
        left_bytes = int(load_bytes(self._learnt, node, digest) * (1.0 - min(max(there, 0.0), 1.0)))
        load = _Load(left_bytes=left_bytes, priority=replica.priority, number=replica.spec.generation)
        self._put(replica.node, digest, load)

    def _put(self, node: NodeName, digest: str, load: _Load) -> None:
        """Several starts of one checkpoint on a node wait for one load: the furthest on, by the best priority."""
        loads = self._loads.setdefault(node, {})
        if before := loads.get(digest):
            load = _Load(
                left_bytes=min(before.left_bytes, load.left_bytes),
                priority=min(before.priority, load.priority),
                number=min(before.number, load.number),
            )
        loads[digest] = load


def load_bytes(learnt: Learnt, node: NodeView, digest: str) -> int:
    """What a load of a checkpoint reads on a node: as the last one did, which may have been in a layout of another
    size, else the copy at rest."""
    return learnt.load_bytes.get((node.report.name, digest)) or node.stored_bytes(digest)
