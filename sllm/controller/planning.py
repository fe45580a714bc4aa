"""One pass of the writer: judge, grant, plan, carry out, tell. Returns when to pass again without being told."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from sllm.controller import copying, displacing, moving, preparing, progress, records
from sllm.controller.handlers import grant_held
from sllm.controller.routes import routes
from sllm.controller.world import World
from sllm.core.ids import ReplicaId, make_id
from sllm.core.node import OPEN
from sllm.core.route import RouteTable
from sllm.core.snapshot import Command, Intent, ReplicaView, Snapshot
from sllm.errors import DeadlineExceeded
from sllm.scheduler import autoscale, retry
from sllm.scheduler.plan import (
    Action,
    DrainReplica,
    KeepReplica,
    MoveRequests,
    Plan,
    RaisePriority,
    RemoveDeployment,
    StartReplica,
    StopReplica,
)
from sllm.scheduler.reconcile import reconcile

log = logging.getLogger(__name__)


async def advance(world: World) -> float | None:
    """Bring the world from what was just learnt to what follows from it."""
    now = world.clock.monotonic()
    await _judge_nodes(world, now)
    world.loads.forget_silent(now)
    for name in world.router.held():
        grant_held(world, name, now)
    _expire(world, now)
    _refuse(world, now)
    _remember_needs(world, now)
    snapshot = displacing.foreseen(world, world.agenda.due(world.compared(now), now))
    plan = reconcile(snapshot, now)
    world.recorder.planned(snapshot, now, plan)
    world.planned_from = snapshot
    world.agenda.planned(snapshot, plan)
    await _carry_out(world, plan)
    await _drop_earlier_revisions(world)
    await _move(world, now)
    snapshot = world.snapshot(now)
    _publish(world, snapshot)
    await _judge_jobs(world, snapshot)
    await preparing.prepare(world, snapshot, now)
    copying.begin(world, snapshot)
    _tell_waiting(world)
    return _wake_at(world, plan, now)


async def _judge_nodes(world: World, now: float) -> None:
    for name in world.cluster.judge(now):
        log.warning("node %s has been silent for %.0f s and is dead", name, world.policy.dead_s)
        world.estimator.forget(name)
        await world.executor.forget(world.cluster.nodes[name].report.address)
        if world.cluster.cordons.get(name, OPEN) == OPEN:
            await world.commit([records.delete_node(name)])


def _expire(world: World, now: float) -> None:
    for waiter in world.router.expire(now):
        replicas = world.cluster.of(waiter.deployment)
        update = progress.waiting(waiter.deployment, replicas, world.reasons)
        world.tickets[waiter.ticket].fail(
            DeadlineExceeded(
                f"{waiter.deployment}: no replica had room within {now - waiter.since:.0f} s ({update.phase})",
                hint="see `sllm status`",
            )
        )


def _refuse(world: World, now: float) -> None:
    """Answer held requests for which nothing will be started any more."""
    for name in world.router.held():
        view = world.cluster.deployments[name]
        refusal = retry.refusal(view, now) or retry.damage(view, world.cluster.nodes.values())
        if refusal and not any(replica.live for replica in world.cluster.of(name)):
            for waiter in world.router.empty(name):
                world.tickets[waiter.ticket].fail(refusal)


def _remember_needs(world: World, now: float) -> None:
    """Of those whose requests, replicas or wishes have changed: what others need is what they needed."""
    snapshot = world.compared(now)
    for name in sorted(world.agenda.touched(snapshot) | (world.touched & snapshot.deployments.keys())):
        view = snapshot.deployments[name]
        demand = autoscale.demand(snapshot, view, world.cluster.of(name))
        remembered = autoscale.remember(view, demand, now)
        world.cluster.deployments[name] = (
            autoscale.kept_warm(remembered, 1, now) if name in world.touched else remembered
        )
    world.touched.clear()


# -- carrying out


async def _carry_out(world: World, plan: Plan) -> None:
    starts = sum(isinstance(action, StartReplica) for action in plan.actions)
    if starts:
        # Stored first: a generation is never given twice, whatever happens.
        await world.commit([records.put_number(records.GENERATION, world.generation + starts)])
    for action in plan.actions:
        await _act(world, action)


async def _act(world: World, action: Action) -> None:
    if isinstance(action, StartReplica):
        _start(world, action)
    elif isinstance(action, RaisePriority):
        _raise(world, action)
    elif isinstance(action, DrainReplica):
        _give_way(world, action)
        _end(world, action.replica, Intent.DRAIN, world.policy.drain_s, action.why)
    elif isinstance(action, StopReplica):
        _give_way(world, action)
        _end(world, action.replica, Intent.STOP, 0.0, action.why)
    elif isinstance(action, MoveRequests):
        displacing.begin(world, action)
    elif isinstance(action, KeepReplica):
        await displacing.give_up(world, action.replica, action.why)
    else:
        await _remove(world, action)


def _start(world: World, action: StartReplica) -> None:
    world.generation += 1
    revision = world.cluster.deployments[action.deployment].current
    id = ReplicaId(make_id("rep", os.urandom(8)))  # noqa: A001 - it is one
    spec = revision.replica(id=id, generation=world.generation, devices=action.devices)
    log.info("start %s of %s on %s: %s", spec.id, spec.deployment, action.node, action.why)
    world.decisions.made(action, spec, world.clock.wall())
    world.cluster.put(ReplicaView(spec=spec, node=action.node, priority=action.priority))
    world.executor.start(world.cluster.nodes[action.node].report.address, spec, action.priority)


def _raise(world: World, action: RaisePriority) -> None:
    view = world.cluster.replicas[action.replica]
    log.info("raise %s of %s on %s: %s", action.replica, view.spec.deployment, view.node, action.why)
    world.cluster.put(replace(view, priority=action.priority))
    world.executor.start(world.cluster.nodes[view.node].report.address, view.spec, action.priority)


def _end(world: World, replica: ReplicaId, intent: Intent, drain_s: float, why: str) -> None:
    view = world.cluster.replicas[replica]
    log.info("%s %s of %s on %s: %s", intent.value, replica, view.spec.deployment, view.node, why)
    world.cluster.intend(replica, intent, Command.SENT)
    world.executor.end(world.cluster.nodes[view.node].report.address, view.spec, intent, drain_s)


def _give_way(world: World, action: DrainReplica | StopReplica) -> None:
    if action.room_for is not None:
        world.cluster.gives_way(action.replica, action.room_for)


async def _remove(world: World, action: RemoveDeployment) -> None:
    await world.commit([records.delete_deployment(action.deployment)])
    del world.cluster.deployments[action.deployment]
    world.cluster.popularity.pop(action.deployment, None)
    world.forecast.forget(action.deployment)
    world.decisions.forget(action.deployment)
    log.info("deployment %s is gone", action.deployment)


async def _move(world: World, now: float) -> None:
    """Go on with what is to be moved."""
    if not world.jobs.moving() or not world.settled(now):
        return
    jobs, decisions, scene = moving.decided(world, world.snapshot(now), now)
    if starts := moving.starts(world, decisions):
        await _carry_out(world, Plan(actions=tuple(starts)))
        jobs, decisions, scene = moving.decided(world, world.snapshot(now), now)
    for job, decision in zip(jobs, decisions, strict=True):
        await moving.judge(world, job, decision, scene)


async def _drop_earlier_revisions(world: World) -> None:
    for name, view in list(world.cluster.deployments.items()):
        if view.earlier and world.settled(world.clock.monotonic()):
            used = {replica.spec.revision for replica in world.cluster.of(name)}
            kept = tuple(revision for revision in view.earlier if revision.number in used)
            if kept != view.earlier:
                pruned = replace(view, earlier=kept)
                await world.commit([records.put_deployment(pruned)])
                world.cluster.deployments[name] = pruned


# -- telling


def _publish(world: World, snapshot: Snapshot) -> None:
    before, table = world.table.value, routes(snapshot)
    if table != before.routes:
        world.table.set(RouteTable(epoch=before.epoch, revision=before.revision + 1, routes=table))


async def _judge_jobs(world: World, snapshot: Snapshot) -> None:
    for job in world.jobs.running():
        if not world.settled(world.clock.monotonic()):
            return
        judged = progress.judged(job, snapshot, world.reasons, world.clock.wall())
        if judged is job:
            continue
        if not judged.running:
            log.info(
                "operation %s (%s %s): %s", job.id, job.operation.kind, job.operation.target, judged.operation.state
            )
            await world.commit([records.put_job(judged)])
        world.jobs.put(judged)


def _tell_waiting(world: World) -> None:
    for name in world.router.held():
        update = progress.waiting(name, world.cluster.of(name), world.reasons)
        for waiter in world.router.waiting(name):
            world.tickets[waiter.ticket].progress(update)


def _wake_at(world: World, plan: Plan, now: float) -> float | None:
    times = [
        plan.wake_at,
        world.agenda.next_wake(),
        preparing.wake_at(world, now),
        world.cluster.next_judgement_at(now),
        world.router.next_deadline(),
    ]
    if not world.settled(now):
        times.append(world.settle_at)
    if moving_jobs := world.jobs.moving():
        wall = world.clock.wall()
        times += [now + job.deadline_at - wall for job in moving_jobs]
        times += [t for t in (world.complete_at, world.flights.next_rest_over()) if t is None or t > now]
    return min((time for time in times if time is not None), default=None)
