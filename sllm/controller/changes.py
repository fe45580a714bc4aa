"""What deploy, scale and delete make of a deployment, or why they may not. Pure."""

from __future__ import annotations

from dataclasses import replace

from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.ids import DeploymentName
from sllm.core.node import NodeState
from sllm.core.snapshot import DeploymentView, Revision, Snapshot
from sllm.errors import CapacityExceeded, Conflict, InvalidArgument, NotFound
from sllm.rpc.control import ScaleRequest
from sllm.scheduler import autoscale, retry
from sllm.scheduler.placement import device_bytes


def found(snapshot: Snapshot, name: DeploymentName) -> DeploymentView:
    """Return a deployment that is there to be changed. Raises NotFound, or Conflict while it is being deleted."""
    view = snapshot.deployments.get(name)
    if view is None:
        raise NotFound(f"no deployment {name!r}", hint="see `sllm status`")
    if view.current.deployment.deleting:
        raise Conflict(f"deployment {name!r} is being deleted", hint="wait until it is gone, then deploy it again")
    return view


def deployed(snapshot: Snapshot, spec: DeploymentSpec, wall: float) -> DeploymentView:
    """Make a deployment, or a new revision of it where its replicas have to be replaced.

    Raises NotFound (checkpoint), InvalidArgument, CapacityExceeded, Conflict.
    """
    checkpoint = _checkpoint(snapshot, spec)
    before = found(snapshot, spec.name) if spec.name in snapshot.deployments else None
    view = _revised(before, spec, checkpoint, wall)
    _check_fits(snapshot, view)
    return view


def scaled(view: DeploymentView, request: ScaleRequest, wall: float) -> DeploymentView:
    """Change a deployment's bounds. Raises InvalidArgument."""
    spec = view.current.deployment.spec
    if request.replicas is not None:
        minimum, maximum = request.replicas, max(spec.max_replicas, request.replicas)
    elif request.min_replicas is None and request.max_replicas is None:
        raise InvalidArgument("nothing to scale to", hint="give --replicas N, or --min A and --max B")
    else:
        minimum = spec.min_replicas if request.min_replicas is None else request.min_replicas
        maximum = spec.max_replicas if request.max_replicas is None else request.max_replicas
    wish = replace(spec, min_replicas=minimum, max_replicas=maximum)
    scaled_view = retry.forgiven(replace(view, current=_rewished(view.current, wish, wall)))
    return scaled_view if request.replicas is None else autoscale.cut(scaled_view, request.replicas)


def deleted(view: DeploymentView, wall: float) -> DeploymentView:
    """Mark a deployment: its replicas go, then its record."""
    deployment = replace(view.current.deployment, deleting=True, updated_at=wall)
    return replace(view, current=replace(view.current, deployment=deployment))


def _checkpoint(snapshot: Snapshot, spec: DeploymentSpec) -> Checkpoint:
    known = snapshot.checkpoints()
    checkpoint = known.get(spec.checkpoint)
    if checkpoint is None:
        names = ", ".join(sorted(known)) or "none yet"
        raise NotFound(
            f"no node holds checkpoint {spec.checkpoint!r}", hint=f"add it with `sllm checkpoint add`; known: {names}"
        )
    if spec.max_model_len is not None and spec.max_model_len > checkpoint.max_model_len:
        raise InvalidArgument(
            f"max model length {spec.max_model_len} is more than the {checkpoint.max_model_len} tokens that "
            f"checkpoint {spec.checkpoint!r} was made for",
            hint=f"use at most {checkpoint.max_model_len}",
        )
    return checkpoint


def _revised(
    before: DeploymentView | None, spec: DeploymentSpec, checkpoint: Checkpoint, wall: float
) -> DeploymentView:
    if before is None:
        return DeploymentView(current=_revision(spec, 1, checkpoint, created_at=wall, wall=wall))
    old = before.current
    if spec.serves_like(old.deployment.spec) and checkpoint.digest == old.deployment.digest:
        return retry.forgiven(replace(before, current=_rewished(old, spec, wall)))
    created_at = old.deployment.created_at
    new = _revision(spec, old.number + 1, checkpoint, created_at=created_at, wall=wall)
    return retry.forgiven(replace(before, current=new, earlier=before.revisions()))


def _revision(spec: DeploymentSpec, number: int, checkpoint: Checkpoint, *, created_at: float, wall: float) -> Revision:
    deployment = Deployment(
        spec=spec, revision=number, digest=checkpoint.digest, created_at=created_at, updated_at=wall
    )
    length = spec.max_model_len or checkpoint.max_model_len
    return Revision(deployment=deployment, max_model_len=length, size_bytes=checkpoint.size_bytes)


def _rewished(revision: Revision, spec: DeploymentSpec, wall: float) -> Revision:
    return replace(revision, deployment=replace(revision.deployment, spec=spec, updated_at=wall))


def _check_fits(snapshot: Snapshot, view: DeploymentView) -> None:
    """Refuse what no node that holds the checkpoint could ever serve, however idle."""
    spec, digest = view.current.deployment.spec, view.current.deployment.digest
    nodes = [n for n in snapshot.nodes.values() if n.state is not NodeState.DEAD and n.tier_of(digest) is not None]
    if not nodes:
        raise NotFound(
            f"no node holds a complete copy of checkpoint {spec.checkpoint!r}", hint="see `sllm checkpoint list`"
        )
    most = max(len(node.report.devices) for node in nodes)
    if most < spec.devices:
        raise CapacityExceeded(
            f"a replica of {spec.name!r} needs {spec.devices} devices of one node, and the most that a node with "
            f"checkpoint {spec.checkpoint!r} has is {most}",
            hint="use fewer --devices, or add the checkpoint to a larger node",
        )
    needed = device_bytes(view)
    # The node whose so-many-th largest device is largest.
    largest = max(
        sorted((d.memory_bytes for d in n.report.devices), reverse=True)[spec.devices - 1]
        for n in nodes
        if len(n.report.devices) >= spec.devices
    )
    if largest < needed:
        raise CapacityExceeded(
            f"the weights of checkpoint {spec.checkpoint!r} take {needed} bytes of each device, and the largest device "
            f"has {largest}",
            hint="use more --devices, a smaller or quantised checkpoint, or larger devices",
        )
