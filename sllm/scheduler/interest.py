"""What checkpoints are asked for, and what a copy in memory is worth for it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sllm.core.node import NodeState
from sllm.core.residency import Tier
from sllm.core.snapshot import DeploymentView, NodeView, Snapshot
from sllm.core.startup import Basis
from sllm.scheduler.estimate import seconds_per_byte
from sllm.scheduler.loading import load_bytes
from sllm.scheduler.placement import device_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Interest:
    """How often a checkpoint was asked for lately, over all deployments of it; `view` is the one asked for most."""

    digest: str
    view: DeploymentView
    requests: float
    rate_rps: float


def interests(snapshot: Snapshot, now: float) -> dict[str, Interest]:
    """What is asked for, by digest."""
    found: dict[str, Interest] = {}
    most: dict[str, float] = {}
    for name, popularity in sorted(snapshot.popularity.items()):
        view = snapshot.deployments.get(name)
        if view is None or view.current.deployment.deleting:
            continue
        digest, own = view.current.deployment.digest, popularity.requests(now)
        requests, rate_rps = own, popularity.rate_rps(now)
        if other := found.get(digest):
            requests, rate_rps = requests + other.requests, rate_rps + other.rate_rps
            view = view if own > most[digest] else other.view
        found[digest] = Interest(digest=digest, view=view, requests=requests, rate_rps=rate_rps)
        most[digest] = max(own, most.get(digest, 0.0))
    return found


def by_worth(found: Iterable[Interest]) -> list[Interest]:
    """Those first whose bytes are asked for most."""
    return sorted(found, key=lambda interest: (-interest.rate_rps * interest.view.current.size_bytes, interest.digest))


def worth(snapshot: Snapshot, node: NodeView, interest: Interest | None, digest: str) -> float | None:
    """Seconds of waiting, each second, that a copy in a node's memory spares: the rate, times reading it again, shared
    with the copies in other nodes' memory. None: nobody has measured how fast the node reads."""
    pace = seconds_per_byte(snapshot.learnt, node.report.name, Tier.SSD)
    if pace.basis is Basis.GUESSED:
        return None
    if interest is None:
        return 0.0
    others = sum(other.in_memory(digest) for other in snapshot.nodes.values() if other is not node)
    read_bytes = load_bytes(snapshot.learnt, node.report.name, digest, node.stored_bytes(digest))
    return interest.rate_rps * read_bytes * pace.seconds / (1 + others)


def could_run(node: NodeView, view: DeploymentView) -> bool:
    """True if it has devices for a replica, free or not."""
    large = sum(device.memory_bytes >= device_bytes(view) for device in node.report.devices)
    return node.state is NodeState.READY and large >= view.current.deployment.spec.devices


def free_bytes(node: NodeView, tier: Tier) -> int:
    return sum(t.capacity_bytes - t.used_bytes for t in node.report.tiers if t.tier is tier)
