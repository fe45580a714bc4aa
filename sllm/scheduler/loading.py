"""The loading queues of nodes, as the starts under way make them: what is read before a new load's turn comes. Pure.

A node reads one checkpoint at a time, the better priority first (docs/architecture.md). What its agent prefetches by
itself is not counted: it gives way to every start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sllm.core.ids import NodeName
from sllm.core.index import Index, NodeEntry
from sllm.core.priority import Priority
from sllm.core.replica import StartPhase
from sllm.core.snapshot import NodeView, ReplicaView, Snapshot
from sllm.core.startup import Learnt

_READ = (StartPhase.BUILDING, StartPhase.READY)
_LAST: Final = 1 << 62  # after every start that was made


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


_IN_MEMORY: Final = Turn(size_bytes=0, ahead_bytes=0)
_NO_LOADS: Final[Mapping[str, _Load]] = {}


class LoadingQueues:
    """As they would be after what was planned so far."""

    def __init__(self, snapshot: Snapshot, index: Index | None = None) -> None:
        self._index = index or Index.of(snapshot)
        self._learnt = snapshot.learnt
        self._last = _LAST
        # Of the nodes that were asked about.
        self._loads: dict[NodeName, Mapping[str, _Load]] = {}

    def add(self, node: NodeView, digest: str, priority: Priority) -> None:
        """A start is planned there."""
        entry = self._index.entries[node.report.name]
        if not entry.in_memory(digest):
            self._last += 1
            load = _Load(left_bytes=self._load_bytes(entry, digest), priority=priority, number=self._last)
            self._loads[entry.name] = _put(self._of(entry), digest, load)

    def turn(self, node: NodeView, digest: str, priority: Priority) -> Turn:
        """Who needs what is loaded already waits for that load, which it may raise."""
        return self.turn_at(self._index.entries[node.report.name], digest, priority)

    def turn_at(self, entry: NodeEntry, digest: str, priority: Priority) -> Turn:
        if entry.in_memory(digest):
            return _IN_MEMORY
        loads = self._of(entry)
        if not loads:
            return Turn(size_bytes=self._load_bytes(entry, digest), ahead_bytes=0)
        own = loads.get(digest)
        mine = (min(own.priority, priority), own.number) if own else (priority, self._last + 1)
        ahead = sum(o.left_bytes for d, o in loads.items() if d != digest and (o.priority, o.number) < mine)
        left_bytes = own.left_bytes if own else self._load_bytes(entry, digest)
        return Turn(size_bytes=left_bytes, ahead_bytes=ahead)

    def _load_bytes(self, entry: NodeEntry, digest: str) -> int:
        return load_bytes(self._learnt, entry.name, digest, entry.stored_bytes.get(digest, 0))

    def _of(self, entry: NodeEntry) -> Mapping[str, _Load]:
        loads = self._loads.get(entry.name)
        if loads is None:
            loads = _NO_LOADS
            for replica in entry.replicas:
                if replica.starting:
                    loads = self._with(loads, entry, replica)
            self._loads[entry.name] = loads
        return loads

    def _with(self, loads: Mapping[str, _Load], entry: NodeEntry, replica: ReplicaView) -> Mapping[str, _Load]:
        status, digest = replica.status, replica.spec.digest
        if entry.view is None or entry.in_memory(digest):
            return loads
        if status is not None and status.phase in _READ:
            return loads
        there = status.progress if status is not None and status.phase is StartPhase.LOADING else 0.0
        left_bytes = int(self._load_bytes(entry, digest) * (1.0 - min(max(there, 0.0), 1.0)))
        return _put(
            loads,
            digest,
            _Load(left_bytes=left_bytes, priority=replica.priority, number=replica.spec.generation),
        )


def _put(loads: Mapping[str, _Load], digest: str, load: _Load) -> Mapping[str, _Load]:
    """Several starts of one checkpoint on a node wait for one load: the furthest on, by the best priority."""
    if before := loads.get(digest):
        load = _Load(
            left_bytes=min(before.left_bytes, load.left_bytes),
            priority=min(before.priority, load.priority),
            number=min(before.number, load.number),
        )
    return {**loads, digest: load}


def load_bytes(learnt: Learnt, node: NodeName, digest: str, stored_bytes: int) -> int:
    """What a load of a checkpoint reads on a node: as the last one did, which may have been in a layout of another
    size, else the copy at rest."""
    return learnt.load_bytes.get((node, digest)) or stored_bytes
