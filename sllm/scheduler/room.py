"""Room: what of a cluster is left for more starts. Changed by one planner, as it plans; no decision is made here."""

from __future__ import annotations

from collections.abc import Iterable

from sllm.core.device import Device, DeviceState
from sllm.core.ids import DeviceId, NodeName
from sllm.core.priority import Priority
from sllm.core.snapshot import NodeView, Snapshot
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
        for replica in snapshot.replicas.values():
            self._take(replica.node, replica.spec.devices)

    def start(self, node: NodeName, devices: Iterable[DeviceId], digest: str, priority: Priority) -> None:
        """A start is planned: it takes its devices, and its turn in the loading queue."""
        self._take(node, devices)
        self.queues.add(self._nodes[node], digest, priority)

    def _take(self, node: NodeName, devices: Iterable[DeviceId]) -> None:
        self._taken[node] = self._taken.get(node, frozenset()) | frozenset(devices)
        self._counts[node] = self._counts.get(node, 0) + 1

    def claim(self, node: NodeName, devices: Iterable[DeviceId], digest: str, priority: Priority) -> None:
        """A start will follow as soon as all of these devices are free: nobody else has those that are."""
        self._taken[node] = self._taken.get(node, frozenset()) | frozenset(devices)
        self.queues.add(self._nodes[node], digest, priority)

    def holders(self, digest: str) -> list[NodeView]:
        """Nodes with a copy at rest."""
        if self._holders is None:
            self._holders = {}
            for view in self._nodes.values():
                for held in {r.digest for r in view.report.residencies}:
                    self._holders.setdefault(held, []).append(view)
        return [view for view in self._holders.get(digest, []) if view.tier_of(digest) is not None]

    def free(self, view: NodeView) -> list[Device]:
        closed = self._taken.get(view.report.name, frozenset()) | view.cordon.devices
        return [d for d in view.report.devices if d.id not in closed and d.state is DeviceState.FREE]

    def count(self, node: NodeName) -> int:
        return self._counts.get(node, 0)
