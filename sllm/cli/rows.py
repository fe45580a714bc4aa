"""JSON of everything the command line prints: our own schema, snake_case, times in ISO 8601 UTC."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sllm.cli.units import time_text
from sllm.core.residency import Residency, TierUsage
from sllm.core.startup import EstimatorError

if TYPE_CHECKING:
    from sllm.core.checkpoint import Checkpoint
    from sllm.core.migration import MigrationPlan
    from sllm.core.node import LoadReport, Node
    from sllm.core.operation import Operation
    from sllm.core.request import RequestRow
    from sllm.rpc.control import CheckpointRow, ClusterStatus, DeploymentRow, ReplicaRow

Row = dict[str, Any]


def status_object(status: ClusterStatus) -> Row:
    """Return the object of `sllm status`."""
    return {
        "version": status.version,
        "deployments": [deployment_row(row) for row in status.deployments],
        "replicas": [replica_row(row) for row in status.replicas],
        "nodes": [node_row(node) for node in status.nodes],
        "estimator": _estimator_object(status.estimator),
    }


def _estimator_object(error: EstimatorError) -> Row:
    return {"starts": error.count, "error_p50": error.p50, "error_p95": error.p95, "guessed": error.guessed}


def deployment_row(row: DeploymentRow) -> Row:
    deployment = row.deployment
    return {
        "state": row.state.value,
        "reason": row.reason,
        **asdict(deployment.spec),
        "revision": deployment.revision,
        "digest": deployment.digest,
        "ready_replicas": row.ready_replicas,
        "wanted_replicas": row.wanted_replicas,
        "running_requests": row.running_requests,
        "held_requests": row.held_requests,
        "created_at": time_text(deployment.created_at),
        "updated_at": time_text(deployment.updated_at),
    }


def replica_row(row: ReplicaRow) -> Row:
    status, spec = row.status, row.status.spec
    return {
        "id": spec.id,
        "deployment": spec.deployment,
        "node": row.node,
        "devices": list(spec.devices),
        "state": status.state.value,
        "phase": status.phase.value,
        "progress": status.progress,
        "revision": spec.revision,
        "generation": spec.generation,
        "checkpoint": spec.checkpoint,
        "capacity": spec.capacity,
        "max_model_len": spec.max_model_len,
        "address": status.address,
        "pid": status.pid,
        "running": status.running,
        "waiting": status.waiting,
        "memory_bytes": status.memory_bytes,
        "phases_s": dict(status.phases_s),
        "error": status.error,
        "error_reason": status.error_reason,
        "started_at": time_text(status.started_at),
        "ready_at": time_text(status.ready_at),
    }


def node_row(node: Node) -> Row:
    report = node.report
    usages = sorted(report.tiers, key=lambda usage: usage.tier)
    return {
        "name": report.name,
        "state": node.state.value,
        "cordoned": node.cordoned,
        "cordoned_devices": list(node.cordoned_devices),
        "address": report.address,
        "version": report.version,
        "engine": report.engine,
        "warm": report.warm,
        "devices": [
            {**asdict(device), "kind": device.kind.value, "state": device.state.value} for device in report.devices
        ],
        "tiers": {usage.tier.name.lower(): _tier_object(usage, report.residencies) for usage in usages},
        "loads": [_load_row(load) for load in report.loads],
        "probe": _load_row(report.probe) if report.probe else None,
        "incarnation": report.incarnation,
        "last_seen": time_text(node.last_seen),
    }


def _load_row(load: LoadReport) -> Row:
    return {**asdict(load), "tier": load.tier.name.lower()}


def _tier_object(usage: TierUsage, residencies: tuple[Residency, ...]) -> Row:
    held = [_residency_row(residency) for residency in residencies if residency.tier is usage.tier]
    return {"capacity_bytes": usage.capacity_bytes, "used_bytes": usage.used_bytes, "checkpoints": held}


def _residency_row(residency: Residency) -> Row:
    return {
        "name": residency.checkpoint,
        "digest": residency.digest,
        "state": residency.state.value,
        "size_bytes": residency.size_bytes,
    }


def checkpoint_row(row: CheckpointRow) -> Row:
    copies = [
        {
            "node": copy.node,
            "tier": copy.residency.tier.name.lower(),
            "state": copy.residency.state.value,
            "size_bytes": copy.residency.size_bytes,
        }
        for copy in row.copies
    ]
    recomputes = [
        {"kind": r.kind.value, **asdict(r.cost), "error_p50": r.error_p50, "error_p95": r.error_p95}
        for r in row.recomputes
    ]
    return {**_checkpoint_object(row.checkpoint), "copies": copies, "recompute": recomputes}


def _checkpoint_object(checkpoint: Checkpoint) -> Row:
    return {**asdict(checkpoint), "created_at": time_text(checkpoint.created_at)}


def request_row(row: RequestRow) -> Row:
    return {
        "id": row.id,
        "deployment": row.deployment,
        "replica": row.replica,
        "node": row.node,
        "state": row.state.value,
        "prompt_tokens": row.prompt_tokens,
        "output_tokens": row.output_tokens,
        "max_tokens": row.max_tokens,
        "interval_s": row.interval_s,
        "moves": row.moves,
        "started_at": time_text(row.started_at),
    }


def plan_object(plan: MigrationPlan) -> Row:
    """Return the object of a dry run."""
    return {"moves": [asdict(move) for move in plan.moves], "starts": list(plan.starts), "why": plan.why}


def operation_row(operation: Operation) -> Row:
    times = {"created_at": time_text(operation.created_at), "updated_at": time_text(operation.updated_at)}
    return {**asdict(operation), "state": operation.state.value, **times}
