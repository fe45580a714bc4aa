"""The route table, told from a snapshot. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from sllm.core.node import NodeState
from sllm.core.route import Route, RouteTarget
from sllm.core.snapshot import DeploymentView, ReplicaView, Revision, Snapshot


def routes(snapshot: Snapshot) -> tuple[Route, ...]:
    """One route per deployment that is not being deleted, by name."""
    replicas = snapshot.replicas_by_deployment()
    views = sorted(snapshot.deployments.values(), key=lambda view: view.name)
    return tuple(
        _route(snapshot, view, replicas.get(view.name, ())) for view in views if not view.current.deployment.deleting
    )


def targets(replicas: Sequence[ReplicaView]) -> list[RouteTarget]:
    """The replicas that take requests, of whatever revision."""
    return [_target(replica) for replica in replicas if replica.ready]


def _route(snapshot: Snapshot, view: DeploymentView, replicas: Sequence[ReplicaView]) -> Route:
    revision = _serving(view, replicas)
    return Route(
        deployment=revision.deployment,
        max_model_len=revision.max_model_len,
        targets=tuple(targets([r for r in replicas if r.spec.revision == revision.number])),
        sources=_sources(snapshot, revision.deployment.digest),
    )


def _serving(view: DeploymentView, replicas: Sequence[ReplicaView]) -> Revision:
    """The newest revision that has a ready replica: a front end must fit the replicas that it sends to, so a gateway
    is told of a new revision when that begins to serve."""
    ready = {replica.spec.revision for replica in replicas if replica.ready}
    return next((revision for revision in view.revisions() if revision.number in ready), view.current)


def _target(replica: ReplicaView) -> RouteTarget:
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


def _sources(snapshot: Snapshot, digest: str) -> tuple[str, ...]:
    living = [node for node in snapshot.nodes.values() if node.state is not NodeState.DEAD]
    living.sort(key=lambda node: (node.state is NodeState.SUSPECT, node.report.name))
    return tuple(node.report.address for node in living if node.tier_of(digest) is not None)
