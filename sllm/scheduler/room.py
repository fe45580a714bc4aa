"""Room: what of a cluster is left for more starts. Changed by one planner, as it plans; no decision is made here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from sllm.core.device import Device, DeviceState
from sllm.core.ids import DeviceId, NodeName
from sllm.core.index import Index, NodeEntry
from sllm.core.priority import Priority
from sllm.core.snapshot import NodeView, ReplicaView, Snapshot
from sllm.scheduler.loading import LoadingQueues

_NONE: frozenset[DeviceId] = frozenset()


class Room:
    """Free devices, replica counts and loading queues per node, as they would be after what was planned so far.

    What the snapshot says of them is in its index; here is what was planned since.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.learnt = snapshot.learnt
        self.index = Index.of(snapshot)
        self.queues = LoadingQueues(snapshot, self.index)
        self._taken: Mapping[NodeName, frozenset[DeviceId]] = {}
        self._freed: Mapping[NodeName, frozenset[DeviceId]] = {}
        self._more: Counter[NodeName] = Counter()

    def start(self, node: NodeName, devices: Iterable[DeviceId], digest: str, priority: Priority) -> None:
        """A start is planned: it takes its devices, and its turn in the loading queue."""
        self.claim(node, devices, digest, priority)
        self._more[node] += 1

    def claim(self, node: NodeName, devices: Iterable[DeviceId], digest: str, priority: Priority) -> None:
        """A start will follow as soon as all of these devices are free: nobody else has those that are."""
        self._taken = {**self._taken, node: self._taken.get(node, _NONE).union(devices)}
        view = self.index.entries[node].view
        assert view is not None  # else nothing would be started there
        self.queues.add(view, digest, priority)

    def without(self, replicas: Iterable[ReplicaView]) -> Room:
        """The room there would be if these replicas had gone; to look at, not to plan in."""
        other = object.__new__(Room)
        other.learnt, other.index, other.queues = self.learnt, self.index, self.queues
        freed, other._taken, other._more = dict(self._freed), self._taken, self._more.copy()
        for replica in replicas:
            freed[replica.node] = freed.get(replica.node, _NONE).union(replica.spec.devices)
            other._more[replica.node] -= 1
        other._freed = freed
        return other

    def holders(self, digest: str) -> list[NodeView]:
        """Nodes with a copy at rest."""
        return [entry.view for entry in self.index.those(self.index.holders(digest)) if entry.view is not None]

    def free(self, view: NodeView) -> list[Device]:
        return list(self.free_of(self.index.entries[view.report.name]))

    def free_of(self, entry: NodeEntry) -> tuple[Device, ...]:
        """The devices of a node that a start may take."""
        name = entry.name
        if name not in self._taken and name not in self._freed:
            return entry.free
        assert entry.view is not None  # only of known nodes it is asked
        freed = self._freed.get(name, _NONE)
        closed = (entry.taken - freed) | self._taken.get(name, _NONE) | entry.view.cordon.devices
        return tuple([d for d in entry.view.report.devices if d.id not in closed and _is_free(d, freed)])

    def open(self, devices: int) -> int:
        """Ready nodes that may have so many free devices: no other has."""
        with_free = self.index.with_free
        nodes = with_free[devices - 1] if len(with_free) >= devices else 0
        for name in self._freed:
            nodes |= (1 << self.index.entries[name].slot) & self.index.ready
        return nodes

    def count(self, node: NodeName) -> int:
        return self.count_of(self.index.entries[node])

    def count_of(self, entry: NodeEntry) -> int:
        """Replicas there."""
        return len(entry.replicas) + self._more.get(entry.name, 0)


def _is_free(device: Device, freed: frozenset[DeviceId]) -> bool:
    return device.state is DeviceState.FREE or (device.state is not DeviceState.LOST and device.id in freed)
