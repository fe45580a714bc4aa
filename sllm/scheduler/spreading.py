"""Copies on more disks: a start, or a migration, can only go where a copy is. Pure.

A checkpoint that is asked for has one copy more for each time that it is asked for twice as often, up to the policy's
bound, each on the node that has the least to expect. Nothing is ever taken from a disk.
"""

from __future__ import annotations

from collections.abc import Mapping

from sllm.core.checkpoint import Checkpoint
from sllm.core.ids import NodeName
from sllm.core.node import NodeState
from sllm.core.residency import Tier
from sllm.core.snapshot import NodeView, Snapshot
from sllm.scheduler.interest import Interest, by_worth, could_run, free_bytes
from sllm.scheduler.residency_plan import CopyCheckpoint, Recent

# Lately, faded: for a second copy. Each further one takes twice as many.
LEAST_REQUESTS = 4.0
# Of a disk this much is left to copies that somebody asks for.
RESERVE = 0.1


def copies(
    snapshot: Snapshot, interests: Mapping[str, Interest], recent: Recent, now: float
) -> tuple[CopyCheckpoint, ...]:
    """Return the one copy that is to be made next, if any."""
    known = snapshot.checkpoints()
    expected = _expected_rps(snapshot, interests)
    for interest in by_worth(interests.values()):
        checkpoint = known.get(interest.view.current.deployment.spec.checkpoint)
        if checkpoint is None or checkpoint.digest != interest.digest or not checkpoint.source:
            continue
        holders = [n for n in snapshot.nodes.values() if n.state is not NodeState.DEAD and n.tier_of(interest.digest)]
        if not holders or len(holders) >= wanted(interest, snapshot.policy.max_copies):
            continue
        needed_bytes = max(node.stored_bytes(interest.digest) for node in holders)
        fit = [
            node
            for node in snapshot.nodes.values()
            if _takes(node, interest, checkpoint, needed_bytes)
            and not recent.copied(node.report.name, interest.digest, now)
        ]
        if fit:
            node = min(fit, key=lambda n: (expected[n.report.name], -free_bytes(n, Tier.SSD), n.report.name))
            return (_copy(checkpoint, node, f"{interest.requests:.0f} requests lately, and {len(holders)} copies"),)
    return ()


def wanted(interest: Interest, most: int) -> int:
    """How many copies there should be."""
    count, requests = 1, LEAST_REQUESTS
    while count < most and interest.requests >= requests:
        count, requests = count + 1, requests * 2
    return count


def _copy(checkpoint: Checkpoint, node: NodeView, why: str) -> CopyCheckpoint:
    return CopyCheckpoint(
        checkpoint=checkpoint.name,
        digest=checkpoint.digest,
        source=checkpoint.source,
        node=node.report.name,
        why=why,
    )


def _expected_rps(snapshot: Snapshot, interests: Mapping[str, Interest]) -> dict[NodeName, float]:
    """Requests per second and device that each node has to expect, if they come alike to all copies."""
    expected = dict.fromkeys(snapshot.nodes, 0.0)
    for digest, interest in interests.items():
        holders = [n for n in snapshot.nodes.values() if n.state is NodeState.READY and n.tier_of(digest)]
        for node in holders:
            expected[node.report.name] += interest.rate_rps / len(holders) / max(1, len(node.report.devices))
    return expected


def _takes(node: NodeView, interest: Interest, checkpoint: Checkpoint, needed_bytes: int) -> bool:
    if not could_run(node, interest.view):
        return False
    if any(known.name == checkpoint.name for known in node.report.checkpoints):
        return False  # it is there; or it is damaged, or another content has its name, which is for people to mend
    reserve = RESERVE * sum(usage.capacity_bytes for usage in node.report.tiers if usage.tier is Tier.SSD)
    return free_bytes(node, Tier.SSD) - reserve >= needed_bytes
