"""What people see of the cluster, told from a snapshot. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sllm.controller.forecast import Forecast, Recompute
from sllm.core.deployment import DeploymentState
from sllm.core.ids import DeploymentName, ReplicaId
from sllm.core.node import Node, NodeState
from sllm.core.replica import ReplicaStatus
from sllm.core.request import RequestRow
from sllm.core.snapshot import DeploymentView, NodeView, ReplicaView, Snapshot
from sllm.core.startup import EstimatorError
from sllm.rpc.control import (
    CheckpointCopy,
    CheckpointList,
    CheckpointRow,
    ClusterStatus,
    DeploymentRow,
    RecomputeRow,
    ReplicaRow,
    RequestList,
)
from sllm.scheduler import retry
from sllm.scheduler.autoscale import scale
from sllm.scheduler.plan import Reason
from sllm.version import VERSION


def cluster_status(
    snapshot: Snapshot, reasons: Mapping[DeploymentName, Reason], estimator: EstimatorError, now: float
) -> ClusterStatus:
    replicas = snapshot.replicas_by_deployment()
    views = sorted(snapshot.deployments.values(), key=lambda view: view.name)
    return ClusterStatus(
        version=VERSION,
        deployments=tuple(_deployment(snapshot, v, replicas.get(v.name, ()), reasons, now) for v in views),
        replicas=tuple(_replica(replica) for name in sorted(replicas) for replica in replicas[name]),
        nodes=tuple(node(snapshot.nodes[name]) for name in sorted(snapshot.nodes)),
        estimator=estimator,
    )


def checkpoint_list(snapshot: Snapshot, forecast: Forecast) -> CheckpointList:
    """Checkpoints by name, each with its copies on nodes that are not dead, and what is learnt of it."""
    living = [v for _, v in sorted(snapshot.nodes.items()) if v.state is not NodeState.DEAD]
    rows = []
    for name, checkpoint in sorted(snapshot.checkpoints().items()):
        copies = tuple(
            CheckpointCopy(node=view.report.name, residency=residency)
            for view in living
            for residency in view.report.residencies
            if residency.checkpoint == name
        )
        recomputes = tuple(_recompute(known) for known in forecast.of(checkpoint.digest))
        rows.append(CheckpointRow(checkpoint=checkpoint, copies=copies, recomputes=recomputes))
    return CheckpointList(checkpoints=tuple(rows))


def _recompute(known: Recompute) -> RecomputeRow:
    p50, p95 = known.error or (None, None)
    return RecomputeRow(kind=known.kind, cost=known.cost, error_p50=p50, error_p95=p95)


def request_list(rows: Iterable[RequestRow], replicas: Mapping[ReplicaId, ReplicaView]) -> RequestList:
    """Open requests, the oldest first, with the nodes they run on. Of two rows of one request the later holds."""
    latest = {row.id: row for row in rows}
    in_order = sorted(latest.values(), key=lambda row: (row.started_at, row.id))
    return RequestList(requests=tuple(placed(row, replicas) for row in in_order))


def placed(row: RequestRow, replicas: Mapping[ReplicaId, ReplicaView]) -> RequestRow:
    """A request with the node that it runs on."""
    replica = replicas.get(row.replica) if row.replica else None
    return replace(row, node=replica.node) if replica else row


def waits_for(snapshot: Snapshot, view: DeploymentView, reasons: Mapping[DeploymentName, Reason], now: float) -> str:
    """What a deployment waits for now; empty if for nothing."""
    return _deployment(snapshot, view, snapshot.replicas_by_deployment().get(view.name, ()), reasons, now).reason


def _deployment(
    snapshot: Snapshot,
    view: DeploymentView,
    replicas: Sequence[ReplicaView],
    reasons: Mapping[DeploymentName, Reason],
    now: float,
) -> DeploymentRow:
    current = sum(r.live and r.spec.revision == view.current.number for r in replicas)
    wanted = scale(view, snapshot, current, now)
    damage = retry.damage(view, snapshot.nodes.values())
    state = _state(view, replicas, wanted.needed, damaged=damage is not None)
    held = snapshot.held.get(view.name)
    return DeploymentRow(
        deployment=view.current.deployment,
        state=state,
        reason=damage.message if damage and state is DeploymentState.FAILED else _reason(view, state, reasons),
        ready_replicas=sum(r.ready for r in replicas),
        wanted_replicas=max(wanted.needed, min(wanted.kept, current)),
        running_requests=sum(snapshot.loads.get(r.spec.id, 0) for r in replicas),
        held_requests=held.count if held else 0,
    )


def _state(view: DeploymentView, replicas: Sequence[ReplicaView], needed: int, *, damaged: bool) -> DeploymentState:
    if view.current.deployment.deleting:
        return DeploymentState.DELETING
    if any(r.ready for r in replicas):
        return DeploymentState.READY
    if any(r.starting for r in replicas):
        return DeploymentState.STARTING
    if damaged or (view.failures and view.failures.given_up):
        return DeploymentState.FAILED
    return DeploymentState.WAITING if needed else DeploymentState.SLEEPING


def _reason(view: DeploymentView, state: DeploymentState, reasons: Mapping[DeploymentName, Reason]) -> str:
    if state is DeploymentState.SLEEPING or state is DeploymentState.DELETING:
        return ""
    if view.failures and view.failures.error:
        return f"the last start failed: {view.failures.error}"
    return str(reasons.get(view.name, ""))


def _replica(replica: ReplicaView) -> ReplicaRow:
    return ReplicaRow(node=replica.node, status=judged(replica))


def judged(replica: ReplicaView) -> ReplicaStatus:
    """What its node last said of a replica, with the state that is decided of it."""
    status = replica.status or ReplicaStatus(spec=replica.spec, state=replica.state)
    return replace(status, state=replica.state)


def node(view: NodeView) -> Node:
    return Node(
        report=view.report,
        state=view.state,
        last_seen=view.last_seen,
        cordoned=view.cordon.node,
        cordoned_devices=tuple(sorted(view.cordon.devices)),
    )
