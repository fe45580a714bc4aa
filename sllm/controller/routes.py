"""The route table, told from a snapshot. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sllm.core.node import NodeState
from sllm.core.residency import ResidencyState, Tier
from sllm.core.route import Route, RouteTarget
from sllm.core.snapshot import DeploymentView, ReplicaView, Revision, Snapshot

SOURCES_NAMED = 4


def routes(snapshot: Snapshot) -> tuple[Route, ...]:
    """One route per deployment that is not being deleted, by name."""
    replicas, sources = snapshot.replicas_by_deployment(), _sources(snapshot)
    views = sorted(snapshot.deployments.values(), key=lambda view: view.name)
    return tuple(
        _route(view, replicas.get(view.name, ()), sources) for view in views if not view.current.deployment.deleting
    )


def targets(replicas: Sequence[ReplicaView]) -> list[RouteTarget]:
    """The replicas that take requests, of whatever revision."""
    return [target_of(replica) for replica in replicas if replica.ready]


def _route(view: DeploymentView, replicas: Sequence[ReplicaView], sources: Mapping[str, list[str]]) -> Route:
    revision = _serving(view, replicas)
    return Route(
        deployment=revision.deployment,
        max_model_len=revision.max_model_len,
        targets=tuple(targets([r for r in replicas if r.spec.revision == revision.number])),
        sources=tuple(sources.get(revision.deployment.digest, ())),
    )


def _serving(view: DeploymentView, replicas: Sequence[ReplicaView]) -> Revision:
    """The newest revision that has a ready replica: a front end must fit the replicas that it sends to, so a gateway
    is told of a new revision when that begins to serve."""
    ready = {replica.spec.revision for replica in replicas if replica.ready}
    return next((revision for revision in view.revisions() if revision.number in ready), view.current)


def target_of(replica: ReplicaView) -> RouteTarget:
    assert replica.status is not None  # it is ready
    spec = replica.spec
    return RouteTarget(
        replica=spec.id,
        node=replica.node,
        address=replica.status.address,
        generation=spec.generation,
        revision=spec.revision,
        capacity=spec.capacity,
    )


def _sources(snapshot: Snapshot) -> dict[str, list[str]]:
    """Agents with a copy at rest, by digest; a few of each are enough."""
    living = [node for node in snapshot.nodes.values() if node.state is not NodeState.DEAD]
    living.sort(key=lambda node: (node.state is NodeState.SUSPECT, node.report.name))
    found: dict[str, list[str]] = {}
    for node in living:
        for held in node.report.residencies:
            if held.tier is Tier.SSD and held.state is ResidencyState.READY:
                sources = found.setdefault(held.digest, [])
                if len(sources) < SOURCES_NAMED:
                    sources.append(node.report.address)
    return found
