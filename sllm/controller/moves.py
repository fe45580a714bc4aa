"""What operators may ask to be moved, or closed, and what would become of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from sllm.controller.jobs import DISPLACE, MIGRATE, Job
from sllm.core.ids import DeploymentName, NodeName, OperationId, ReplicaId, RequestId
from sllm.core.migration import MigrationPlan, PlannedMove
from sllm.core.node import Cordon, NodeState
from sllm.core.request import RequestRow
from sllm.core.snapshot import NodeView, ReplicaView, Snapshot
from sllm.errors import CapacityExceeded, Conflict, InvalidArgument, NotFound, QueueFull, SllmError
from sllm.rpc.control import CordonRequest, DrainRequest, MigrateRequest
from sllm.scheduler.destinations import Obstacle, Refusal
from sllm.scheduler.migrations import Decision, Traffic, Wish, decide
from sllm.scheduler.plan import StartReplica
from sllm.scheduler.reconcile import reconcile

_DRY = OperationId("")
_ERRORS: Mapping[Obstacle, type[SllmError]] = {
    Obstacle.NODE: Conflict,
    Obstacle.CHECKPOINT: NotFound,
    Obstacle.REVISION: Conflict,
    Obstacle.LIMIT: Conflict,
    Obstacle.DEVICES: QueueFull,
    Obstacle.MEMORY: CapacityExceeded,
    Obstacle.ROOM: QueueFull,
    Obstacle.FAILED: Conflict,
}


def error_of(refusal: Refusal) -> SllmError:
    return _ERRORS[refusal.on](refusal.text, hint=refusal.hint)


def requests_to_move(
    snapshot: Snapshot, rows: Mapping[RequestId, RequestRow], request: MigrateRequest
) -> tuple[RequestId, ...]:
    """The requests that are asked for. Raises NotFound, Conflict, InvalidArgument."""
    if (request.request is None) is (request.replica is None):
        raise InvalidArgument("one request or one replica is to be moved", hint="name one of them")
    open_node(snapshot, request.node)
    if request.request is not None:
        source = _running(snapshot, rows, request.request)
        found: tuple[RequestId, ...] = (request.request,)
    else:
        source = _serving(snapshot, ReplicaId(request.replica or ""))
        found = tuple(sorted(row.id for row in rows.values() if row.replica == source.spec.id))
    if source.node == request.node:
        raise Conflict(f"{request.request or request.replica} is on node {request.node!r} already")
    return found


def open_node(snapshot: Snapshot, name: NodeName) -> NodeView:
    """A node that takes something new. Raises NotFound, Conflict."""
    view = known_node(snapshot, name)
    if view.state is not NodeState.READY:
        hint = f"`sllm uncordon {name}` opens it" if view.cordon.node else "see `sllm nodes`"
        raise Conflict(f"node {name!r} is {view.state.value}", hint=hint)
    return view


def known_node(snapshot: Snapshot, name: NodeName) -> NodeView:
    view = snapshot.nodes.get(name)
    if view is None:
        raise NotFound(f"no node {name!r}", hint="see `sllm nodes`")
    return view


def _running(snapshot: Snapshot, rows: Mapping[RequestId, RequestRow], request: RequestId) -> ReplicaView:
    row = rows.get(request)
    if row is None:
        raise NotFound(f"no request {request!r}", hint="see `sllm requests`; gateways tell of new ones every second")
    source = snapshot.replicas.get(row.replica) if row.replica else None
    if source is None:
        raise Conflict(f"request {request} is {row.state.value}: it runs nowhere that it could be moved from")
    return source


def _serving(snapshot: Snapshot, replica: ReplicaId) -> ReplicaView:
    view = snapshot.replicas.get(replica)
    if view is None:
        raise NotFound(f"no replica {replica!r}", hint="see `sllm status`")
    if not view.serves:
        raise Conflict(f"{replica} is {view.state.value}: nothing runs on it")
    return view


def joined(running: Iterable[Job], job: Job) -> Job:
    """The job that does what `job` is to do: it, or one that does so already. Raises Conflict where they differ."""
    for other in running:
        if (other.operation.kind, other.operation.target) != (job.operation.kind, job.operation.target):
            continue
        if other.nodes != job.nodes:
            raise Conflict(
                f"{job.operation.target} is on its way to node {other.nodes[0]!r}: {other.id}",
                hint="try again when it is there",
            )
        requests = tuple(dict.fromkeys(other.requests + job.requests))
        asked = other.request_ids + job.request_ids
        return replace(other, request_ids=asked, requests=requests, deadline_at=job.deadline_at)
    return job


def check_drain(snapshot: Snapshot, request: DrainRequest) -> NodeView:
    """Raises NotFound, Conflict, InvalidArgument."""
    if not (math.isfinite(request.deadline_s) and request.deadline_s > 0):
        raise InvalidArgument("the deadline is no time to come", hint="give for example --deadline 120s")
    view = known_node(snapshot, request.node)
    if view.state is NodeState.DEAD:
        raise Conflict(f"node {request.node!r} is dead: nothing runs on it that could be moved")
    return view


def cordoned(snapshot: Snapshot, before: Cordon, request: CordonRequest) -> Cordon:
    """What is closed once the request is granted. Raises NotFound."""
    view = known_node(snapshot, request.node)
    if request.device is None:
        return replace(before, node=request.cordoned, draining=before.draining and request.cordoned)
    devices = [device.id for device in view.report.devices]
    if request.device not in devices and request.device not in before.devices:
        known = ", ".join(devices) or "none"
        raise NotFound(f"node {request.node!r} has no device {request.device!r}", hint=f"its devices: {known}")
    only = frozenset({request.device})
    return replace(before, devices=before.devices | only if request.cordoned else before.devices - only)


# -- what would become of it


def plan_migration(
    snapshot: Snapshot, traffic: Traffic, requests: tuple[RequestId, ...], request: MigrateRequest
) -> MigrationPlan:
    """What moving these requests would do. Raises what it would be refused with."""
    decision = checked(snapshot, traffic, requests, request.node)
    starts = (decision.start.node,) if decision.start else ()
    why = "" if decision.moves else f"nothing runs on {request.replica}"
    return MigrationPlan(moves=decision.moves, starts=starts, why=why)


def checked(snapshot: Snapshot, traffic: Traffic, requests: tuple[RequestId, ...], node: NodeName) -> Decision:
    """The decision on moving these requests. Raises what is in the way of the first that cannot go."""
    (decision,) = decide(snapshot, traffic, [Wish(operation=_DRY, node=node, requests=requests)])
    for refusal in decision.refusals.values():
        raise error_of(refusal)
    return decision


def plan_drain(snapshot: Snapshot, traffic: Traffic, request: DrainRequest, now: float) -> MigrationPlan:
    """What a drain would do now. Raises what it would be refused with."""
    check_drain(snapshot, request)
    closed = _draining(snapshot, request.node)
    starts = {a.deployment: a.node for a in reconcile(closed, now).actions if isinstance(a, StartReplica)}
    (decision,) = decide(closed, traffic, [Wish(operation=_DRY, node=request.node, within_s=request.deadline_s)])
    moves = tuple(_after_start(move, traffic, starts) for move in decision.moves)
    stops = sorted(r.spec.id for r in snapshot.replicas.values() if r.node == request.node)
    why = f"stopped once they are empty: {', '.join(stops)}" if stops else "no replica is there"
    return MigrationPlan(moves=moves, starts=tuple(sorted(starts.values())), why=why)


def _draining(snapshot: Snapshot, node: NodeName) -> Snapshot:
    view = snapshot.nodes[node]
    closed = replace(view, state=NodeState.DRAINING, cordon=replace(view.cordon, node=True, draining=True))
    replicas = {i: replace(r, leaving=r.node == node or r.leaving) for i, r in snapshot.replicas.items()}
    return replace(snapshot, nodes={**snapshot.nodes, node: closed}, replicas=replicas)


def _after_start(move: PlannedMove, traffic: Traffic, starts: Mapping[DeploymentName, NodeName]) -> PlannedMove:
    """A request without a destination goes to the replica that is started for its deployment."""
    node = starts.get(traffic.requests[move.request].deployment)
    if not move.move or move.target is not None or node is None:
        return move
    return replace(move, target_node=node, why=f"a replica is started on {node}")


def wish(job: Job, tried: Mapping[RequestId, tuple[ReplicaId, ...]], wall: float) -> Wish:
    """What a job asks of the scheduler at this moment."""
    requests = job.requests if job.operation.kind == MIGRATE else None
    return Wish(
        operation=job.id,
        node=job.nodes[0],
        requests=requests,
        replica=job.replica if job.operation.kind == DISPLACE else None,
        within_s=max(0.0, job.deadline_at - wall),
        tried=tried,
    )


def ends_of(jobs: Iterable[Job], snapshot: Snapshot, rows: Mapping[RequestId, RequestRow]) -> frozenset[ReplicaId]:
    """The sources and destinations of migrations under way, which are not let go before these are over."""
    found: set[ReplicaId] = set()
    for job in jobs:
        if job.operation.kind == MIGRATE:
            found.update(_ends(job, snapshot, rows))
        elif job.operation.kind == DISPLACE:
            found.update(_all_of_its_deployment(job, snapshot))
    return frozenset(found)


def _all_of_its_deployment(job: Job, snapshot: Snapshot) -> Iterable[ReplicaId]:
    """Any of them may be where its requests go."""
    source = snapshot.replicas.get(job.replica) if job.replica else None
    for replica in snapshot.replicas.values():
        if source is not None and replica.spec.deployment == source.spec.deployment:
            yield replica.spec.id


def _ends(job: Job, snapshot: Snapshot, rows: Mapping[RequestId, RequestRow]) -> Iterable[ReplicaId]:
    named = (rows[request].replica for request in job.requests if request in rows)
    sources = {replica for replica in (*named, job.replica) if replica is not None}
    yield from sources
    deployments = {snapshot.replicas[source].spec.deployment for source in sources if source in snapshot.replicas}
    for replica in snapshot.replicas.values():
        if replica.node == job.nodes[0] and replica.spec.deployment in deployments:
            yield replica.spec.id
