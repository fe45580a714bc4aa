"""The oracle: where a replica goes, told by looking at every node, without an index."""

from __future__ import annotations

from sllm.core.device import DeviceState
from sllm.core.node import NodeState
from sllm.core.priority import Priority
from sllm.core.residency import Tier
from sllm.core.snapshot import DeploymentView, NodeView, Snapshot
from sllm.core.startup import Estimate
from sllm.scheduler.estimate import Start, estimate
from sllm.scheduler.loading import LoadingQueues
from sllm.scheduler.placement import device_bytes

NEAR, NEAR_S = 0.05, 0.01


def options(snapshot: Snapshot, view: DeploymentView) -> dict[str, Estimate]:
    """What a start is expected to take on each node where one is possible now."""
    return {
        name: found for name, node in snapshot.nodes.items() if (found := _option(snapshot, node, view)) is not None
    }


def place(snapshot: Snapshot, view: DeploymentView) -> str | None:
    """The node that is taken; None: there is none."""
    found = options(snapshot, view)
    avoided = view.failures.nodes if view.failures else frozenset()
    pool = {name: of for name, of in found.items() if name not in avoided} or found
    if not pool:
        return None
    counts = {name: sum(r.node == name for r in snapshot.replicas.values()) for name in pool}
    if any(of.guessed for of in pool.values()):
        digest = view.current.deployment.digest

        def rule(name: str):
            node = snapshot.nodes[name]
            return (not node.report.warm, -(node.tier_of(digest) or Tier.SSD), counts[name], name)

        return min(pool, key=rule)
    limit = near(min(of.total_s for of in pool.values()))
    return min(
        (name for name, of in pool.items() if of.total_s <= limit),
        key=lambda name: (pool[name].size_bytes > 0, counts[name], name),
    )


def near(seconds: float) -> float:
    return seconds * (1 + NEAR) + NEAR_S


def _option(snapshot: Snapshot, node: NodeView, view: DeploymentView) -> Estimate | None:
    name, digest = node.report.name, view.current.deployment.digest
    if node.state is not NodeState.READY or node.tier_of(digest) is None:
        return None
    taken = {device for r in snapshot.replicas.values() if r.node == name for device in r.spec.devices}
    free = [
        d
        for d in node.report.devices
        if d.state is DeviceState.FREE
        and d.id not in taken
        and d.id not in node.cordon.devices
        and d.memory_bytes >= device_bytes(view)
    ]
    if len(free) < view.current.deployment.spec.devices:
        return None
    turn = LoadingQueues(snapshot).turn(node, digest, Priority.REQUEST)
    start = Start(
        node=name,
        warm=node.report.warm,
        kind=free[0].kind,
        digest=digest,
        tier=Tier.SSD if turn.size_bytes else Tier.DRAM,
        size_bytes=turn.size_bytes,
        ahead_bytes=turn.ahead_bytes,
    )
    return estimate(snapshot.learnt, start)
