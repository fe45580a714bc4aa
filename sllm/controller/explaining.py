"""What `sllm explain` is told of a deployment, a replica or a request."""

from __future__ import annotations

from dataclasses import replace

from sllm.controller.decisions import told_of
from sllm.controller.status import placed, waits_for
from sllm.controller.world import World
from sllm.core.decision import Decision, Explanation
from sllm.core.ids import DeploymentName, ReplicaId, RequestId
from sllm.core.request import RequestRow, RequestState
from sllm.core.snapshot import ReplicaView, Snapshot
from sllm.errors import NotFound
from sllm.scheduler.placement import place
from sllm.scheduler.room import Room

_MEMORY = "a controller that begins anew knows only what runs"


def explain(world: World, target: str) -> Explanation:
    """Raises NotFound."""
    snapshot = world.snapshot(world.clock.monotonic())
    if target in snapshot.deployments:
        return _deployment(world, snapshot, DeploymentName(target))
    if target.startswith("rep-"):
        return _replica(world, snapshot, ReplicaId(target))
    if target.startswith("req-"):
        return _request(world, snapshot, RequestId(target))
    raise NotFound(
        f"no deployment {target!r}",
        hint="see `sllm status`; ids of replicas begin with rep-, those of requests with req-",
    )


def _deployment(world: World, snapshot: Snapshot, name: DeploymentName) -> Explanation:
    decided = [_as_it_is(decision, snapshot) for decision in world.decisions.of(name)]
    known = {decision.replica for decision in decided}
    found = [r for r in snapshot.replicas_by_deployment().get(name, []) if r.spec.id not in known]
    return replace(_now(world, snapshot, name), decisions=(*decided, *map(_found, reversed(found))))


def _replica(world: World, snapshot: Snapshot, id: ReplicaId) -> Explanation:  # noqa: A002 - it is one
    decision = _decision(world, snapshot, id)
    if decision is None:
        raise NotFound(
            f"no replica {id!r}",
            hint=f"see `sllm status`; of those that are gone the last of each deployment are known, and {_MEMORY}",
        )
    return replace(_now(world, snapshot, decision.deployment), decisions=(decision,))


def _request(world: World, snapshot: Snapshot, id: RequestId) -> Explanation:  # noqa: A002 - it is one
    row, wait = world.rows().get(id), world.waits.get(id)
    if row is not None and row.state is RequestState.HELD:
        return _held(world, snapshot, row)
    found = row or wait
    if found is None:
        raise NotFound(
            f"no request {id!r}",
            hint="see `sllm requests`; gateways tell of new ones every second, and of those that are over the last "
            f"that waited are known; {_MEMORY}",
        )
    decision = _decision(world, snapshot, found.replica) if found.replica else None
    return replace(
        _now(world, snapshot, found.deployment),
        request=placed(row, snapshot.replicas) if row else None,
        held_at=wait.held_at if wait else None,
        granted_at=wait.granted_at if wait else None,
        decisions=(decision,) if decision else (),
    )


def _held(world: World, snapshot: Snapshot, row: RequestRow) -> Explanation:
    """A request that waits for a replica, with those that are starting."""
    starting = [r.spec.id for r in world.cluster.of(row.deployment) if r.starting]
    decisions = [_decision(world, snapshot, replica) for replica in reversed(starting)]
    return replace(
        _now(world, snapshot, row.deployment),
        request=row,
        held_at=_held_at(world, row),
        decisions=tuple(decision for decision in decisions if decision),
    )


def _held_at(world: World, row: RequestRow) -> float | None:
    """When a request that is held came to wait."""
    waiters = (waiter for waiter in world.router.waiting(row.deployment) if waiter.row.id == row.id)
    since = next((waiter.since for waiter in waiters), None)
    return None if since is None else world.clock.wall() - (world.clock.monotonic() - since)


def _now(world: World, snapshot: Snapshot, name: DeploymentName) -> Explanation:
    """What a deployment waits for, and where its next replica would be started."""
    view = snapshot.deployments.get(name)
    if view is None:
        return Explanation(deployment=name)
    reason = world.reasons.get(name)
    candidates = reason.candidates if reason else ()
    candidates = told_of(candidates or place(Room(snapshot), view).candidates)
    waits = waits_for(snapshot, view, world.reasons, world.clock.monotonic())
    return Explanation(deployment=name, waits_for=waits, candidates=candidates)


def _decision(world: World, snapshot: Snapshot, id: ReplicaId) -> Decision | None:  # noqa: A002 - it is one
    decision, view = world.decisions.get(id), snapshot.replicas.get(id)
    if decision is not None:
        return _as_it_is(decision, snapshot)
    return _found(view) if view is not None else None


def _as_it_is(decision: Decision, snapshot: Snapshot) -> Decision:
    """With the replica's state, and the phases that are over if it is starting still."""
    view = snapshot.replicas.get(decision.replica)
    if view is None:
        return decision
    phases_s = decision.phases_s or (dict(view.status.phases_s) if view.status else {})
    return replace(decision, state=view.state, phases_s=phases_s)


def _found(view: ReplicaView) -> Decision:
    """A replica that a controller before this one has started."""
    spec, status = view.spec, view.status
    return Decision(
        replica=spec.id,
        deployment=spec.deployment,
        revision=spec.revision,
        node=view.node,
        devices=spec.devices,
        priority=view.priority,
        decided_at=0.0,
        why="a controller before this one started it",
        state=view.state,
        phases_s=dict(status.phases_s) if status else {},
        ready_at=status.ready_at if status and status.ready_at else None,
        error=status.error if status else "",
    )
