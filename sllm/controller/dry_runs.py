"""What deploying or scaling would do at once, and when it would be ready: the same decisions, on a snapshot in which
the change has been made. Pure: nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sllm.controller.decisions import told_of
from sllm.core.decision import DeploymentPlan, PlannedStart, PlannedStop
from sllm.core.ids import ReplicaId
from sllm.core.snapshot import DeploymentView, Intent, ReplicaView, Snapshot
from sllm.scheduler import autoscale
from sllm.scheduler.placement import place
from sllm.scheduler.plan import Action, DrainReplica, StartReplica, StopReplica
from sllm.scheduler.reconcile import reconcile
from sllm.scheduler.room import Room


def dry_run(
    snapshot: Snapshot, changed: DeploymentView, now: float, *, let_go: Iterable[ReplicaView] = ()
) -> DeploymentPlan:
    """`changed` is the deployment as it would be; `let_go` are replicas that the change itself ends."""
    ended = {replica.spec.id: replica for replica in let_go}
    after = _after(snapshot, changed, now, ended)
    usual = set(_ending(reconcile(snapshot, now).actions))
    plan = reconcile(after, now)
    starts = [a for a in plan.actions if isinstance(a, StartReplica) and a.deployment == changed.name]
    stops = {replica: why for replica, why in _ending(plan.actions) if (replica, why) not in usual}
    reason = plan.reasons.get(changed.name)
    return DeploymentPlan(
        deployment=changed.name,
        revision=changed.current.number,
        starts=tuple(_start(action) for action in starts),
        stops=(
            *(_stop(snapshot, replica, "it is more than is asked for") for replica in ended),
            *(_stop(snapshot, replica, why) for replica, why in stops.items()),
            *_replaced(after, changed, {*ended, *stops}),
        ),
        waits_for=str(reason) if reason else "",
        ready_s=max((a.estimate.total_s for a in starts if a.estimate), default=None),
        candidates=told_of(place(Room(after), changed).candidates),
    )


def _after(snapshot: Snapshot, changed: DeploymentView, now: float, ended: dict[ReplicaId, ReplicaView]) -> Snapshot:
    replicas = dict(snapshot.replicas)
    for replica in ended.values():
        replicas[replica.spec.id] = replace(replica, intent=Intent.DRAIN if replica.ready else Intent.STOP)
    after = replace(snapshot, replicas=replicas, deployments={**snapshot.deployments, changed.name: changed})
    demand = autoscale.demand(after, changed, after.replicas_by_deployment().get(changed.name, []))
    remembered = autoscale.remember(changed, demand, now)
    return replace(after, deployments={**after.deployments, changed.name: remembered})


def _ending(actions: Iterable[Action]) -> Iterable[tuple[ReplicaId, str]]:
    return [(a.replica, a.why) for a in actions if isinstance(a, DrainReplica | StopReplica)]


def _replaced(after: Snapshot, changed: DeploymentView, already: set[ReplicaId]) -> list[PlannedStop]:
    """Replicas of earlier revisions, which serve until new ones do."""
    number = changed.current.number
    of_it = after.replicas_by_deployment().get(changed.name, [])
    old = [r.spec.id for r in of_it if r.ready and r.spec.revision != number and r.spec.id not in already]
    return [_stop(after, replica, f"once revision {number} serves") for replica in old]


def _start(action: StartReplica) -> PlannedStart:
    return PlannedStart(node=action.node, devices=action.devices, why=action.why, estimate=action.estimate)


def _stop(snapshot: Snapshot, replica: ReplicaId, why: str) -> PlannedStop:
    view = snapshot.replicas[replica]
    return PlannedStop(replica=replica, deployment=view.spec.deployment, node=view.node, why=why)
