"""What agents say: registrations, heartbeats, and how their commands ended."""

from __future__ import annotations

import logging
from dataclasses import replace

from sllm.controller import records
from sllm.controller.events import CommandEnded, Contested, Registered
from sllm.controller.forecast import kind_of
from sllm.controller.world import World
from sllm.core.cluster import Changes
from sllm.core.ids import DeploymentName
from sllm.core.node import OPEN, NodeReport, NodeState
from sllm.core.priority import Priority
from sllm.core.snapshot import Command, DeploymentView, Intent, NodeView, ReplicaView
from sllm.errors import Conflict, DeadlineExceeded, SllmError, StaleGeneration, Unavailable
from sllm.rpc.nodes import HeartbeatRequest, HeartbeatResponse, RegisterResponse
from sllm.scheduler import autoscale, retry

log = logging.getLogger(__name__)


async def registered(world: World, event: Registered) -> RegisterResponse | Contested:
    """Take an agent in, or ask for proof that the one who has the name is gone."""
    if contested := _contested(world, event):
        return contested
    await _take(world, event.report)
    return RegisterResponse(epoch=world.executor.epoch, heartbeat_s=world.policy.heartbeat_s)


async def heartbeat(world: World, request: HeartbeatRequest) -> HeartbeatResponse:
    """Raises Conflict if another living agent has the name."""
    view = world.cluster.nodes.get(request.name)
    if view and (view.report.incarnation != request.incarnation or view.state is NodeState.DEAD):
        view = None  # whoever it was that is known by this name, it is not, or no longer, this one
    resync = False
    if request.report is not None:
        await _reported(world, view, request.report)
    elif view and view.report.revision == request.revision:
        _alive(world, view)
    else:
        resync = True
    return HeartbeatResponse(epoch=world.executor.epoch, resync=resync)


async def _reported(world: World, view: NodeView | None, report: NodeReport) -> None:
    if contested := _contested(world, Registered(report=report)):
        raise name_taken(report, contested)
    if view is None or report.revision >= view.report.revision:
        await _take(world, report)


def _alive(world: World, view: NodeView) -> None:
    now, name = world.clock.monotonic(), view.report.name
    changes = world.cluster.heard(name, now=now, wall=world.clock.wall())
    apply(world, changes, now)
    if changes.gone or world.cluster.nodes[name].state is not view.state:
        world.changed = True


def name_taken(report: NodeReport, contested: Contested) -> Conflict:
    return Conflict(
        f"node name {report.name!r} belongs to a living agent at {contested.address}",
        hint="give each agent its own name",
    )


def command_ended(world: World, event: CommandEnded) -> None:
    """Note an agent's answer. What was overtaken by a later intent, or by the replica's end, is dropped."""
    view = world.cluster.replicas.get(event.replica)
    if view is None or view.intent is not event.intent:
        return
    if event.error is None:
        world.cluster.put(replace(view, command=Command.DONE))
    elif event.intent is Intent.RUN and view.status is not None:
        # It has begun. Whether its agent heard of the priority is not known: it is told again if a request waits.
        retry_at = world.clock.monotonic() + world.policy.heartbeat_s
        world.cluster.put(replace(view, command=Command.DONE, priority=Priority.PREWARM, retry_at=retry_at))
    elif event.intent is Intent.RUN:
        _start_refused(world, view, event.error)
    else:
        log.warning("%s of %s on %s: %s", event.intent.value, event.replica, view.node, event.error)
        retry_at = world.clock.monotonic() + world.policy.heartbeat_s
        world.cluster.put(replace(view, command=Command.DUE, retry_at=retry_at))


def apply(world: World, changes: Changes, now: float) -> None:
    """Draw the consequences of a report for deployments."""
    for replica in changes.adopted:
        log.info("%s of %s runs on %s", replica.spec.id, replica.spec.deployment, replica.node)
        world.generation = max(world.generation, replica.spec.generation)
        _keep_warm(world, replica.spec.deployment, now)
    for replica in changes.failed:
        _failed(world, replica, now)
    for replica in changes.ready:
        _started(world, replica)
        view = world.cluster.deployments.get(replica.spec.deployment)
        if view:
            _update(world, retry.succeeded(view, replica.spec.revision, now))


def _contested(world: World, event: Registered) -> Contested | None:
    """The agent that has the name, if it was heard of lately at another address."""
    view = world.cluster.nodes.get(event.report.name)
    if view is None or view.report.incarnation in (event.report.incarnation, event.displaced):
        return None
    if view.report.address == event.report.address or _is_silent(world, view):
        return None
    return Contested(incarnation=view.report.incarnation, address=view.report.address)


def _is_silent(world: World, view: NodeView) -> bool:
    return world.clock.monotonic() >= view.seen_at + world.policy.suspect_s


async def _take(world: World, report: NodeReport) -> None:
    before = world.cluster.nodes.get(report.name)
    if before is None or before.state is NodeState.DEAD:
        cordon = world.cluster.cordons.get(report.name, OPEN)
        await world.commit([records.put_node(report.name, cordon)])
        log.info("node %s joined from %s", report.name, report.address)
    elif before.report.address != report.address:
        await world.executor.forget(before.report.address)
    now = world.clock.monotonic()
    world.changed = True
    world.awaited.discard(report.name)
    world.estimator.reported(report, now)
    apply(world, world.cluster.observe(report, now=now, wall=world.clock.wall()), now)


def _started(world: World, replica: ReplicaView) -> None:
    """A replica is ready: note it beside what was expected, and learn from it."""
    spec, status = replica.spec, replica.status
    assert status is not None  # the report said so
    log.info("%s of %s is ready on %s", spec.id, spec.deployment, replica.node)
    known = world.decisions.get(spec.id) is not None
    decision = world.decisions.ready(status, world.clock.wall())
    kind = kind_of(replica, world.cluster.nodes)
    # One whose node was thought to be dead for a while becomes ready a second time.
    if kind is not None and (decision is not None or not known):
        world.estimator.started(status, kind, estimate=decision.estimate if decision else None)


def _failed(world: World, replica: ReplicaView, now: float) -> None:
    status = replica.status
    assert status is not None  # the report said so
    spec = replica.spec
    log.warning("%s of %s failed on %s: %s", spec.id, spec.deployment, replica.node, status.error)
    world.decisions.failed(spec.id, status.error, status.phases_s)
    view = world.cluster.deployments.get(spec.deployment)
    if view:
        reason = status.error_reason or "ENGINE_FAILED"
        _count(world, view, replica, error=status.error, reason=reason, now=now)


def _start_refused(world: World, replica: ReplicaView, error: SllmError) -> None:
    now, spec = world.clock.monotonic(), replica.spec
    log.warning("start of %s on %s: %s", spec.id, replica.node, error)
    world.decisions.failed(spec.id, error.message, {})
    if isinstance(error, StaleGeneration):
        log.error("an agent has seen a newer controller: is another one running?")
    if _is_unclear(error):
        # It may have begun, or may yet: make sure that it ends before its devices are used again.
        world.cluster.intend(spec.id, Intent.STOP, Command.DUE)
    else:
        world.cluster.forget(spec.id)
    view = world.cluster.deployments.get(spec.deployment)
    if view:
        judge = _put_off if _is_unclear(error) or isinstance(error, Conflict) else _count
        judge(world, view, replica, error=error.message, reason=error.reason, now=now)


def _count(world: World, view: DeploymentView, replica: ReplicaView, *, error: str, reason: str, now: float) -> None:
    counted = retry.failed(
        view,
        replica.node,
        replica.spec.revision,
        error=error,
        reason=reason,
        now=now,
        policy=world.policy,
        holders=world.cluster.holders(replica.spec.digest),
        ready_at=replica.ready_at,
    )
    _update(world, counted)


def _put_off(world: World, view: DeploymentView, replica: ReplicaView, *, error: str, reason: str, now: float) -> None:
    revision, policy = replica.spec.revision, world.policy
    _update(world, retry.hindered(view, replica.node, revision, error=error, reason=reason, now=now, policy=policy))


def _is_unclear(error: SllmError) -> bool:
    return isinstance(error, Unavailable | DeadlineExceeded) or type(error) is SllmError


def _keep_warm(world: World, name: DeploymentName, now: float) -> None:
    view = world.cluster.deployments.get(name)
    if view:
        live = sum(replica.live for replica in world.cluster.of(name))
        _update(world, autoscale.kept_warm(view, live, now))


def _update(world: World, view: DeploymentView) -> None:
    world.cluster.deployments[view.name] = view
