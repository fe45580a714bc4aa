"""Tables of everything the command line prints, as cells of text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sllm.cli.output import Table
from sllm.cli.units import size_text, time_text
from sllm.core.device import DeviceKind, DeviceState
from sllm.core.node import Node
from sllm.core.replica import ReplicaState, ReplicaStatus, StartPhase
from sllm.core.residency import Residency, ResidencyState, Tier
from sllm.core.startup import EstimatorError

if TYPE_CHECKING:
    from sllm.core.migration import MigrationPlan, PlannedMove
    from sllm.core.request import RequestRow
    from sllm.loader.format import Manifest
    from sllm.rpc.control import CheckpointRow, DeploymentRow, RecomputeRow, ReplicaRow

NONE = "-"


def deployments(rows: Iterable[DeploymentRow]) -> Table:
    return Table(
        title="DEPLOYMENTS",
        columns=("NAME", "STATE", "REPLICAS", "MIN/MAX", "RUNNING", "HELD", "CHECKPOINT", "REASON"),
        rows=tuple(_deployment(row) for row in rows),
        empty="(none; `sllm deploy` makes one)",
    )


def _deployment(row: DeploymentRow) -> tuple[str, ...]:
    spec = row.deployment.spec
    return (
        spec.name,
        row.state.value,
        f"{row.ready_replicas}/{row.wanted_replicas}",
        f"{spec.min_replicas}/{spec.max_replicas}",
        str(row.running_requests),
        str(row.held_requests),
        spec.checkpoint,
        row.reason or NONE,
    )


def replicas(rows: Iterable[ReplicaRow]) -> Table:
    return Table(
        title="REPLICAS",
        columns=("ID", "DEPLOYMENT", "NODE", "DEVICES", "STATE", "RUNNING"),
        rows=tuple(_replica(row) for row in rows),
        empty="(none)",
    )


def _replica(row: ReplicaRow) -> tuple[str, ...]:
    spec = row.status.spec
    devices = ", ".join(spec.devices) or NONE
    return (spec.id, spec.deployment, row.node, devices, _replica_state(row.status), str(row.status.running))


def _replica_state(status: ReplicaStatus) -> str:
    if status.state is ReplicaState.STARTING and status.phase is not StartPhase.READY:
        share = f" {status.progress:.0%}" if status.progress > 0 else ""
        return f"{status.state.value}: {status.phase.value}{share}"
    if status.state is ReplicaState.FAILED and status.error:
        return f"{status.state.value}: {status.error}"
    return status.state.value


def residency(nodes: Iterable[Node]) -> Table:
    """Nodes with the checkpoints that they hold, per tier."""
    nodes = tuple(nodes)
    tiers = (Tier.DEVICE, Tier.DRAM, Tier.SSD)
    return Table(
        title="NODES",
        columns=("NAME", "STATE", "DEVICES FREE", *(_tier_name(tier, nodes) for tier in tiers)),
        rows=tuple(
            (node.report.name, node.state.value, _devices(node), *(_held(node, tier) for tier in tiers))
            for node in nodes
        ),
        empty="(none; `sllm agent` adds one)",
    )


def _tier_name(tier: Tier, nodes: tuple[Node, ...]) -> str:
    cuda = any(device.kind is DeviceKind.CUDA for node in nodes for device in node.report.devices)
    return "GPU" if tier is Tier.DEVICE and cuda else tier.name


def _devices(node: Node) -> str:
    devices = node.report.devices
    free = sum(device.state is DeviceState.FREE for device in devices)
    kinds = "+".join(sorted({device.kind.value for device in devices}))
    closed = f" ({len(node.cordoned_devices)} cordoned)" if node.cordoned_devices else ""
    return f"{free}/{len(devices)} {kinds}".rstrip() + closed


def _held(node: Node, tier: Tier) -> str:
    return ", ".join(_copy_text(copy) for copy in node.report.residencies if copy.tier is tier) or NONE


def _copy_text(copy: Residency) -> str:
    return copy.checkpoint if copy.state is ResidencyState.READY else f"{copy.checkpoint} ({copy.state.value})"


def estimator_note(error: EstimatorError) -> str:
    """How well startup times were told lately; empty while nobody knows."""
    if error.p50 is None or error.p95 is None:
        return ""
    starts = "start" if error.count == 1 else f"{error.count} starts"
    return f"predicted startup times were wrong by {error.p50:.1%} (median), {error.p95:.1%} (p95) in the last {starts}"


def nodes(rows: Iterable[Node]) -> Table:
    return Table(
        columns=("NAME", "STATE", "ADDRESS", "ENGINE", "WARM", "DEVICES FREE", "DRAM USED", "SSD USED", "LAST SEEN"),
        rows=tuple(_node(node) for node in rows),
        empty="(none; `sllm agent` adds one)",
    )


def _node(node: Node) -> tuple[str, ...]:
    report = node.report
    return (
        report.name,
        node.state.value,
        report.address,
        report.engine,
        "yes" if report.warm else "no",
        _devices(node),
        _usage(node, Tier.DRAM),
        _usage(node, Tier.SSD),
        time_text(node.last_seen) or NONE,
    )


def _usage(node: Node, tier: Tier) -> str:
    found = [usage for usage in node.report.tiers if usage.tier is tier]
    return f"{size_text(found[0].used_bytes)} of {size_text(found[0].capacity_bytes)}" if found else NONE


def checkpoints(rows: Iterable[CheckpointRow]) -> Table:
    return Table(
        columns=("NAME", "SIZE", "ARCHITECTURE", "DTYPE", "MAX LENGTH", "HELD BY"),
        rows=tuple(_checkpoint(row) for row in rows),
        empty="(none; `sllm checkpoint add` adds one)",
    )


def _checkpoint(row: CheckpointRow) -> tuple[str, ...]:
    checkpoint = row.checkpoint
    return (
        checkpoint.name,
        size_text(checkpoint.size_bytes),
        checkpoint.architecture,
        checkpoint.dtype,
        str(checkpoint.max_model_len),
        ", ".join(sorted({copy.node for copy in row.copies})) or NONE,
    )


def checkpoint_details(row: CheckpointRow) -> tuple[Table, Table]:
    """One checkpoint: what it is, and where its copies are."""
    checkpoint = row.checkpoint
    facts = (
        ("name", checkpoint.name),
        ("digest", checkpoint.digest),
        ("size", size_text(checkpoint.size_bytes)),
        ("tensors", str(checkpoint.tensor_count)),
        ("architecture", checkpoint.architecture),
        ("dtype", checkpoint.dtype),
        ("max length", str(checkpoint.max_model_len)),
        ("source", checkpoint.source or NONE),
        ("added", time_text(checkpoint.created_at) or NONE),
        *((f"recompute, {known.kind.value}", _recompute(known)) for known in row.recomputes),
    )
    copies = tuple((copy.node, copy.residency.tier.name, copy.residency.state.value) for copy in row.copies)
    return Table(columns=("CHECKPOINT", ""), rows=facts), Table(columns=("NODE", "TIER", "STATE"), rows=copies)


def _recompute(known: RecomputeRow) -> str:
    cost = known.cost
    error = "" if known.error_p50 is None else f", wrong by {known.error_p50:.0%} (median)"
    return f"{cost.per_token_s * 1e6:.0f} us a token + {cost.fixed_s * 1000:.1f} ms ({cost.observations} rounds{error})"


def manifest_details(folder: Path, manifest: Manifest) -> tuple[Table, Table]:
    """A checkpoint's folder on this machine: what it is, and its tensors in load order."""
    model = manifest.model
    facts = (
        ("path", str(folder)),
        ("digest", manifest.digest),
        ("layout", manifest.layout),
        ("size", size_text(manifest.tensor_bytes)),
        ("partitions", str(len(manifest.partitions))),
        ("tensors", str(len(manifest.tensors))),
        ("architecture", model.architecture if model else NONE),
        ("dtype", manifest.main_dtype),
        ("source", manifest.source or NONE),
        ("made", time_text(manifest.created_at) or NONE),
    )
    tensors = tuple(
        (name, each.dtype, "x".join(map(str, each.shape)) or "scalar", size_text(each.size_bytes))
        for name, each in manifest.tensors.items()
    )
    columns = ("TENSOR", "DTYPE", "SHAPE", "SIZE")
    return Table(columns=("CHECKPOINT", ""), rows=facts), Table(columns=columns, rows=tensors)


def requests(rows: Iterable[RequestRow]) -> Table:
    return Table(
        columns=("ID", "DEPLOYMENT", "STATE", "REPLICA", "NODE", "PROMPT", "OUTPUT", "MOVES", "STARTED"),
        rows=tuple(_request(row) for row in rows),
        empty="(none runs or waits)",
    )


def _request(row: RequestRow) -> tuple[str, ...]:
    return (
        row.id,
        row.deployment,
        row.state.value,
        row.replica or NONE,
        row.node or NONE,
        str(row.prompt_tokens),
        str(row.output_tokens),
        str(row.moves),
        time_text(row.started_at) or NONE,
    )


def migration_plan(plan: MigrationPlan) -> tuple[Table, ...]:
    """What would be moved, the first to move first; then what would be started for it."""
    moves = Table(
        columns=("REQUEST", "FROM", "TO", "MOVE", "PAUSE", "LEFT", "WHY"),
        rows=tuple(_planned(move) for move in plan.moves),
        empty="(no request would be moved)",
    )
    notes = [("start a replica", node) for node in plan.starts] + ([("note", plan.why)] if plan.why else [])
    return (moves, Table(columns=("ALSO", ""), rows=tuple(notes))) if notes else (moves,)


def _planned(move: PlannedMove) -> tuple[str, ...]:
    return (
        move.request,
        f"{move.source_node} ({move.source})",
        f"{move.target_node} ({move.target})" if move.target else move.target_node or NONE,
        "yes" if move.move else "no",
        f"{move.pause_s * 1000:.0f} ms" if move.move else NONE,
        NONE if move.left_s is None else f"{move.left_s:.1f} s",
        move.why,
    )
