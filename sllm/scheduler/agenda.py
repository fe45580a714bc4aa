"""Agenda: which deployments the next plan has to look at, so that it comes to the same as one that looks at all. Pure.

A plan for a deployment depends on itself, its replicas and its requests; on the time, of which it says when; and, as
long as it waits for room, on the nodes that hold its checkpoint and on what runs there. So due are those that were
touched, those whose time has come, and of those that wait the ones for whom a node has changed.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

from sllm.core.cluster import Touched
from sllm.core.ids import DeploymentName
from sllm.core.index import NO_NODES, Index
from sllm.core.snapshot import Snapshot
from sllm.core.startup import NOTHING_LEARNT
from sllm.scheduler.plan import Plan, Reason, StartReplica

_OF_ALL = ("policy", "settled", "loads_fresh", "pinned")


class Agenda:
    """Mutable, for one owner. In the beginning all are due."""

    def __init__(self) -> None:
        self.reasons: dict[DeploymentName, Reason] = {}
        self._all = True
        self._touched: set[DeploymentName] = set()
        self._nodes = NO_NODES
        self._nearby: set[DeploymentName] = set()
        self._wakes: list[tuple[float, DeploymentName]] = []
        self._wake_at: dict[DeploymentName, float] = {}
        self._learnt = NOTHING_LEARNT

    def touch(self, deployment: DeploymentName) -> None:
        """Its requests, or what is wanted of it, have changed."""
        self._touched.add(deployment)

    def touch_others(self, deployment: DeploymentName) -> None:
        """Its replicas have become more or less busy: others may wait for their devices."""
        self._nearby.add(deployment)

    def touch_all(self) -> None:
        """Something has changed that concerns every deployment."""
        self._all = True

    def noted(self, touched: Touched) -> None:
        """Take in what the cluster's state says has changed."""
        self._touched |= touched.deployments
        self._nodes |= touched.nodes

    def compare(self, before: Snapshot | None, after: Snapshot) -> None:
        """Take in what differs of the requests and of what concerns all, for who is not told of each change."""
        if before is None or any(getattr(before, what) != getattr(after, what) for what in _OF_ALL):
            self.touch_all()
            return
        self._touched |= {name for name, _ in before.held.items() ^ after.held.items()}
        for name, _ in before.loads.items() ^ after.loads.items():
            replica = after.replicas.get(name)
            if replica is not None:
                self._touched.add(replica.spec.deployment)

    def touched(self, snapshot: Snapshot) -> set[DeploymentName]:
        """Deployments that have changed themselves since the last plan; they stay on the agenda."""
        return set(snapshot.deployments) if self._all else self._touched & snapshot.deployments.keys()

    def due(self, snapshot: Snapshot, now: float) -> Snapshot:
        """The snapshot with what is due in it; all of that is taken from the agenda."""
        if self._all:
            self._all = False
            self._touched.clear()
            self._nearby.clear()
            self._nodes = NO_NODES
            return replace(snapshot, due=None)
        due, self._touched = self._touched, set()
        if snapshot.learnt is not self._learnt:
            # How long requests are held to spare a swap goes by what starts take (`sllm.scheduler.swapping`).
            self._learnt = snapshot.learnt
            due |= snapshot.held.keys() & self._wake_at.keys()
        due |= self._whose_time_has_come(now)
        # How long what runs elsewhere runs on is another matter at each time, and what they wait for is nobody else's.
        displaced = (r.room_for for r in Index.of(snapshot).astray.values() if r.displaced)
        due |= (snapshot.held.keys() | {name for name in displaced if name}) & snapshot.deployments.keys()
        due |= self._for_whom_a_node_has_changed(snapshot, due)
        return replace(snapshot, due=frozenset(due))

    def planned(self, snapshot: Snapshot, plan: Plan) -> None:
        """Note what became of what was due."""
        if snapshot.due is None:
            self.reasons.clear()
            self._wake_at.clear()
        for name in snapshot.due or ():
            self.reasons.pop(name, None)
            self._wake_at.pop(name, None)
        # A replica that comes and goes before the next plan leaves no trace in what that is made from.
        self._touched |= {action.deployment for action in plan.actions if isinstance(action, StartReplica)}
        self.reasons.update(plan.reasons)
        for name, at in plan.wakes.items():
            self._wake_at[name] = at
            heapq.heappush(self._wakes, (at, name))

    def next_wake(self) -> float | None:
        """When a deployment is to be looked at again without being touched."""
        while self._wakes and self._wake_at.get(self._wakes[0][1]) != self._wakes[0][0]:
            heapq.heappop(self._wakes)
        return self._wakes[0][0] if self._wakes else None

    def _whose_time_has_come(self, now: float) -> set[DeploymentName]:
        found: set[DeploymentName] = set()
        while (at := self.next_wake()) is not None and at <= now:
            name = heapq.heappop(self._wakes)[1]
            del self._wake_at[name]
            found.add(name)
        return found

    def _for_whom_a_node_has_changed(self, snapshot: Snapshot, due: set[DeploymentName]) -> set[DeploymentName]:
        nearby, self._nearby = self._nearby | due, set()
        nodes, self._nodes = self._nodes, NO_NODES
        if not self.reasons:
            return set()
        index = Index.of(snapshot)
        for name in nearby:
            for replica in index.of_deployment.get(name, ()):
                nodes |= 1 << index.entries[replica.node].slot
        return {name for name in self.reasons if self._concerns(name, nodes, snapshot, index)}

    def _concerns(self, name: DeploymentName, nodes: int, snapshot: Snapshot, index: Index) -> bool:
        view = snapshot.deployments.get(name)
        return view is None or bool(index.holders(view.current.deployment.digest) & nodes)
