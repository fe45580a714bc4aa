"""How far an operation has come, told from the cluster as it is. Pure: after a restart the same answer comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sllm.controller import jobs
from sllm.controller.jobs import Job
from sllm.core.ids import DeploymentName
from sllm.core.node import NodeState
from sllm.core.operation import Operation, OperationState
from sllm.core.replica import ReplicaState
from sllm.core.snapshot import DeploymentView, ReplicaView, Snapshot
from sllm.errors import Conflict, NotFound, SllmError, Unavailable, error_from
from sllm.rpc.routes import AcquireUpdate
from sllm.scheduler.plan import Reason


def judged(job: Job, snapshot: Snapshot, reasons: Mapping[DeploymentName, Reason], wall: float) -> Job:
    """Return the job as it now stands."""
    operation = job.operation
    if job.operation.kind in (jobs.DEPLOY, jobs.SCALE):
        operation = _of_deployment(job, snapshot, reasons)
    elif job.operation.kind == jobs.DELETE:
        operation = _of_delete(job, snapshot)
    elif job.operation.kind == jobs.VERIFY and job.done_on is not None:
        operation = _done(job.operation)
    elif job.done_on is not None:
        operation = _of_copies(job, snapshot)
    if operation == job.operation:
        return job
    return replace(job, operation=replace(operation, updated_at=wall))


def failed(job: Job, error: SllmError, wall: float) -> Job:
    """Return the job as ended by an error."""
    return replace(job, operation=replace(_failed(job.operation, error), updated_at=wall))


def waiting(
    name: DeploymentName, replicas: list[ReplicaView], reasons: Mapping[DeploymentName, Reason]
) -> AcquireUpdate:
    """What a deployment without room waits for: the start that is furthest on, else the planner's reason."""
    starting = [r.status for r in replicas if r.starting and r.status]
    if starting:
        # Phases are in the order of their definition.
        order = list(type(starting[0].phase))
        best = max(starting, key=lambda status: (order.index(status.phase), status.progress))
        return AcquireUpdate(phase=best.phase.value, progress=best.progress)
    if any(r.starting for r in replicas):
        return AcquireUpdate(phase="queued", progress=0.0)
    reason = reasons.get(name)
    return AcquireUpdate(phase=reason.text if reason else "waiting for room")


def _of_deployment(job: Job, snapshot: Snapshot, reasons: Mapping[DeploymentName, Reason]) -> Operation:
    name = DeploymentName(job.operation.target)
    view = snapshot.deployments.get(name)
    if view is None or view.current.deployment.deleting:
        return _failed(job.operation, NotFound(f"deployment {name!r} was deleted meanwhile"))
    if view.current.number != job.revision:
        return _failed(job.operation, Conflict(f"deployment {name!r} was deployed again meanwhile"))
    replicas = [r for r in snapshot.replicas.values() if r.spec.deployment == name]
    if _reached(job, view, replicas):
        return _done(job.operation)
    current = [r for r in replicas if r.spec.revision == job.revision]
    if view.failures and view.failures.given_up and not any(r.live for r in current):
        return _failed(job.operation, _start_error(view))
    leaving = sum(not r.live for r in replicas)
    if leaving and _has_enough(view, replicas):
        return replace(job.operation, phase=f"waiting for {leaving} replicas to end", progress=None)
    update = waiting(name, current, reasons)
    return replace(job.operation, phase=update.phase, progress=update.progress)


def _reached(job: Job, view: DeploymentView, replicas: list[ReplicaView]) -> bool:
    if job.operation.kind == jobs.DEPLOY:
        return _has_enough(view, replicas)
    leaving = any(r.state in (ReplicaState.DRAINING, ReplicaState.STOPPING) for r in replicas)
    most = view.current.deployment.spec.max_replicas
    return _has_enough(view, replicas) and not leaving and sum(r.live for r in replicas) <= most


def _has_enough(view: DeploymentView, replicas: list[ReplicaView]) -> bool:
    ready = sum(r.ready and r.spec.revision == view.current.number for r in replicas)
    return ready >= view.current.deployment.spec.min_replicas


def _start_error(view: DeploymentView) -> SllmError:
    assert view.failures is not None
    nodes = ", ".join(sorted(view.failures.nodes))
    return error_from(
        view.failures.reason or "ENGINE_FAILED",
        f"deployment {view.name!r} did not start: {view.failures.error}",
        hint=f"see `sllm logs` of {nodes}",
    )


def _of_delete(job: Job, snapshot: Snapshot) -> Operation:
    view = snapshot.deployments.get(DeploymentName(job.operation.target))
    if view is None or not view.current.deployment.deleting:
        return _done(job.operation)
    left = sum(r.spec.deployment == view.name for r in snapshot.replicas.values())
    return replace(job.operation, phase=f"stopping {left} replicas", progress=None)


def _of_copies(job: Job, snapshot: Snapshot) -> Operation:
    """The agents have done it; it is over when their nodes' reports say so, so that what follows can count on it."""
    for node, digest in job.done_on or ():
        view = snapshot.nodes.get(node)
        if view is None or view.state is NodeState.DEAD:
            return _failed(job.operation, Unavailable(f"node {node!r} died meanwhile"))
        held = any(c.name == job.operation.target and c.digest == digest for c in view.report.checkpoints)
        held = held and view.tier_of(digest) is not None
        if held is not (job.operation.kind == jobs.ADD):
            return replace(job.operation, phase=f"waiting for the report of {node}", progress=None)
    return _done(job.operation)


def _done(operation: Operation) -> Operation:
    return replace(operation, state=OperationState.DONE, phase="", progress=1.0)


def _failed(operation: Operation, error: SllmError) -> Operation:
    return replace(
        operation,
        state=OperationState.FAILED,
        error=error.message,
        error_reason=error.reason,
        hint=error.hint,
    )
