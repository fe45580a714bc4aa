"""On which nodes a checkpoint is added, verified or removed. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sllm.controller.jobs import Job
from sllm.core.ids import NodeName, checkpoint_name
from sllm.core.node import NodeState
from sllm.core.residency import Tier
from sllm.core.snapshot import NodeView, Snapshot
from sllm.errors import Conflict, InvalidArgument, NotFound, Unavailable
from sllm.rpc.control import AddCheckpointRequest, RemoveCheckpointRequest, VerifyCheckpointRequest

_HINT = "see `sllm nodes`"


def nodes_to_add(snapshot: Snapshot, request: AddCheckpointRequest) -> tuple[NodeName, ...]:
    """The nodes asked for; none: any one that can. Raises InvalidArgument, NotFound, Unavailable."""
    checkpoint_name(request.name)
    if not request.source:
        raise InvalidArgument("a checkpoint needs a source", hint="give a folder of safetensors on the node")
    if request.nodes and request.all_nodes:
        raise InvalidArgument("give --node or --all, not both")
    for node in request.nodes:
        if _node(snapshot, node).state is not NodeState.READY:
            raise Unavailable(f"node {node!r} is {snapshot.nodes[node].state.value}", hint=_HINT)
    ready = tuple(sorted(name for name, view in snapshot.nodes.items() if view.state is NodeState.READY))
    if not ready:
        raise Unavailable("no node is ready", hint=_HINT)
    return ready if request.all_nodes else request.nodes


def by_free_space(snapshot: Snapshot) -> list[NodeView]:
    """Ready nodes, the one with the most room on its SSD first."""
    ready = [view for view in snapshot.nodes.values() if view.state is NodeState.READY]
    return sorted(ready, key=lambda view: (-_free_bytes(view), view.report.name))


def nodes_to_remove(snapshot: Snapshot, request: RemoveCheckpointRequest) -> tuple[NodeName, ...]:
    """The nodes asked for, or all that hold it. Raises NotFound, and Conflict while a deployment needs it."""
    holders = _holders(snapshot, request.name, request.nodes)
    chosen = request.nodes or holders
    _check_unused(snapshot, request.name, chosen, last=set(chosen) == set(holders))
    return chosen


def nodes_to_verify(snapshot: Snapshot, request: VerifyCheckpointRequest) -> tuple[NodeName, ...]:
    """The nodes asked for, or all that hold it. Raises NotFound."""
    holders = _holders(snapshot, request.name, request.nodes)
    return request.nodes or holders


def _holders(snapshot: Snapshot, name: str, wanted: Iterable[NodeName]) -> tuple[NodeName, ...]:
    """All nodes that hold a checkpoint. Raises NotFound if there is none, or one that is wanted is not among them."""
    holders = tuple(sorted(node for node, view in snapshot.nodes.items() if _holds(view, name)))
    for node in wanted:
        if node not in holders:
            _node(snapshot, node)
            raise NotFound(f"node {node!r} does not hold checkpoint {name!r}", hint="see `sllm checkpoint list`")
    if not holders:
        raise NotFound(f"no node holds checkpoint {name!r}", hint="see `sllm checkpoint list`")
    return holders


def joined(running: Job | None, job: Job) -> Job:
    """The job that does what `job` is to do: it, or the one that runs already. Raises Conflict where they differ."""
    if running is None:
        return job
    if _work(running) == _work(job):
        return replace(running, request_ids=running.request_ids + job.request_ids)
    raise Conflict(
        f"{running.operation.kind} of {running.operation.target!r} is under way: {running.id}",
        hint="try again when it is over",
    )


def _work(job: Job) -> tuple[object, ...]:
    return job.operation.kind, job.source, set(job.nodes), job.deep


def _check_unused(snapshot: Snapshot, name: str, nodes: Iterable[NodeName], *, last: bool) -> None:
    users = sorted(d.name for d in snapshot.deployments.values() if d.current.deployment.spec.checkpoint == name)
    if users and last:
        raise Conflict(f"checkpoint {name!r} is used by {', '.join(users)}", hint="`sllm delete` these first")
    for replica in snapshot.replicas.values():
        if replica.spec.checkpoint == name and replica.node in nodes:
            raise Conflict(f"checkpoint {name!r} is used by {replica.spec.id} on node {replica.node!r}", hint=_HINT)


def _node(snapshot: Snapshot, name: NodeName) -> NodeView:
    view = snapshot.nodes.get(name)
    if view is None:
        raise NotFound(f"no node {name!r}", hint=_HINT)
    return view


def _holds(view: NodeView, name: str) -> bool:
    return view.state is not NodeState.DEAD and any(c.name == name for c in view.report.checkpoints)


def _free_bytes(view: NodeView) -> int:
    return sum(t.capacity_bytes - t.used_bytes for t in view.report.tiers if t.tier is Tier.SSD)
