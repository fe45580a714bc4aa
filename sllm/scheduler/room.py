"""Room: what of a cluster is left for more starts. Changed by one planner, as it plans; no decision is made here."""

from __future__ import annotations

from collections.abc import Iterable

from sllm.core.device import Device, DeviceState
from sllm.core.ids import DeviceId, NodeName
from sllm.core.priority import Priority
from sllm.core.snapshot import NodeView, ReplicaView, Snapshot
from sllm.scheduler.loading import LoadingQueues


class Room:
    """Free devices, replica counts and loading queues per node, as they would be after what was planned so far."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.learnt = snapshot.learnt
        self.queues = LoadingQueues(snapshot)
        self._nodes = snapshot.nodes
        self._taken: dict[NodeName, frozenset[DeviceId]] = {}
        self._counts: dict[NodeName, int] = {}
        self._holders: dict[str, list[NodeView]] | None = None
        self._freed: frozenset[tuple[NodeName, DeviceId]] = frozenset()
        for replica in snapshot.replicas.values():
            self._take(replica.node, replica.spec.devices)

    def start(self, node: NodeName, devices: Iterable[DeviceId], digest: str, priority: Priority) -> None:
        """A start is planned: it takes its devices, and its turn in the loading queue."""
        self._take(node, devices)
        self.queues.add(self._nodes[node], digest, priority)

    def _take(self, node: NodeName, devices: Iterable[DeviceId]) -> None:
        self._taken[node] = self._taken.get(node, frozenset()) | frozenset(devices)
        self._counts[node] = self._counts.get(node, 0) + 1

    def without(self, replicas: Iterable[ReplicaView]) -> Room:
        """The room there would be if these replicas had gone; to look at, not to plan in."""
        other = object.__new__(Room)
        other.learnt, other.queues = self.learnt, self.queues
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
