"""When a replica that is kept but idle makes room for another deployment: not at each request. Pure.

Two deployments that share a device swap places as often as either is asked for, and each swap keeps both waiting. So a
newcomer's requests are gathered before the swap. How many is the N-policy of queues with a set-up cost (Heyman, 1968):
with rates a and b, and a swap there and back that takes T, those of the one who leaves wait a * T^2 / 2 for each swap;
gathering N of the other's costs them (N - 1) / 2b each. The sum is least with the least N for which

    N * (N + 1) >= a * b * T^2

which is 1, and nothing is held, unless both are asked for again within about the time that a swap takes. Where the next
of the newcomer's requests is not expected before the bound, there is nothing to gather either.
"""

from __future__ import annotations

from sllm.core.popularity import product_falls_to
from sllm.core.residency import Tier
from sllm.core.snapshot import DeploymentView, NodeView, ReplicaView, Snapshot
from sllm.scheduler.estimate import Start, estimate
from sllm.scheduler.loading import load_bytes

AT_ONCE = float("-inf")


def yields_at(
    snapshot: Snapshot, replica: ReplicaView, owner: DeploymentView, newcomer: DeploymentView, *, last: bool
) -> float:
    """The time from which on an idle replica of `owner` may make room for the held requests of `newcomer`.

    `last`: the owner has no other one. The time changes only when what is in the snapshot does; it is bounded by the
    newcomer's oldest request, and may be in the past.
    """
    policy, since = snapshot.policy, snapshot.held[newcomer.name].since
    at = AT_ONCE if replica.ready_at is None else replica.ready_at + policy.min_loaded_s
    if last:
        at = max(at, _gathered_at(snapshot, replica, owner, newcomer))
    return min(at, since + policy.swap_hold_s)


def _gathered_at(snapshot: Snapshot, replica: ReplicaView, owner: DeploymentView, newcomer: DeploymentView) -> float:
    """When enough requests are held for what the swap costs: that falls as both are asked for less."""
    leaves, comes = snapshot.popularity.get(owner.name), snapshot.popularity.get(newcomer.name)
    hold_s, held = snapshot.policy.swap_hold_s, snapshot.held[newcomer.name]
    if leaves is None or comes is None or hold_s == 0.0:
        return AT_ONCE
    none_expected_at = comes.falls_to(1.0 / hold_s)
    if none_expected_at <= held.since:
        return AT_ONCE
    swap_s = _swap_s(snapshot, replica, owner, newcomer)
    if not swap_s:
        return AT_ONCE
    enough_at = product_falls_to(leaves, comes, held.count * (held.count + 1) / swap_s**2)
    return min(none_expected_at, enough_at)


def _swap_s(snapshot: Snapshot, replica: ReplicaView, owner: DeploymentView, newcomer: DeploymentView) -> float | None:
    """What it takes to start the one and then the other again; None: nobody has measured it."""
    node = snapshot.nodes.get(replica.node)
    if node is None:
        return None
    there = _start_s(snapshot, node, replica, newcomer)
    back = _start_s(snapshot, node, replica, owner)
    return None if there is None or back is None else there + back


def _start_s(snapshot: Snapshot, node: NodeView, replica: ReplicaView, view: DeploymentView) -> float | None:
    """What a start on the devices of a replica would take, with nothing else to load; None: that would be a guess."""
    digest = view.current.deployment.digest
    kinds = {device.id: device.kind for device in node.report.devices}
    kind = kinds.get(replica.spec.devices[0])
    if kind is None or node.tier_of(digest) is None:
        return None
    in_memory = node.in_memory(digest)
    start = Start(
        node=node.report.name,
        warm=node.report.warm,
        kind=kind,
        digest=digest,
        tier=Tier.DRAM if in_memory else Tier.SSD,
        size_bytes=0 if in_memory else load_bytes(snapshot.learnt, node.report.name, digest, node.stored_bytes(digest)),
        ahead_bytes=0,
    )
    found = estimate(snapshot.learnt, start)
    return None if found.guessed else found.total_s
