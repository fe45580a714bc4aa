"""Carries out what migrations and drains ask for: gives sources their orders, starts replicas, and ends the jobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import replace

from sllm.controller import jobs, moves, progress, records, verdicts
from sllm.controller.events import MigrationEnded, MigrationReported, Woken
from sllm.controller.jobs import Job
from sllm.controller.routes import target_of
from sllm.controller.store.base import Op
from sllm.controller.verdicts import Scene
from sllm.controller.world import World
from sllm.core.ids import MigrationId, NodeName, ReplicaId, RequestId, make_id
from sllm.core.migration import MigrationOrder, MigrationState
from sllm.core.operation import Operation
from sllm.core.priority import Priority
from sllm.core.request import RequestRow
from sllm.core.snapshot import Snapshot
from sllm.errors import SllmError
from sllm.scheduler.displacement import SPARED_S
from sllm.scheduler.migrations import Decision, Order, Traffic, Wish, decide
from sllm.scheduler.plan import Action, StartReplica
from sllm.scheduler.refuge import CONCURRENCY

log = logging.getLogger(__name__)

WITHIN_S = 60.0
# A migration, with the start of a replica for it.
MIGRATE_S = 600.0
_VERDICTS = {
    jobs.MIGRATE: verdicts.of_migration,
    jobs.DRAIN: verdicts.of_drain,
    jobs.DISPLACE: verdicts.of_displacement,
}


def traffic(
    world: World,
    snapshot: Snapshot,
    rows: Mapping[RequestId, RequestRow],
    now: float,
    *,
    nodes: Collection[NodeName],
    requests: Collection[RequestId],
) -> Traffic:
    """What runs and what is on its way; and what is expected of these requests, and of those on these nodes."""
    running = {row.id: row for row in rows.values() if row.replica in snapshot.replicas}
    there = {replica.spec.id for replica in snapshot.replicas.values() if replica.node in nodes}
    asked = [row for row in running.values() if row.replica in there or row.id in requests]
    return Traffic(
        requests=running,
        outlooks={row.id: world.forecast.outlook(row, snapshot) for row in asked},
        moving=world.flights.moving(),
        busy=world.flights.busy(now),
    )


def decided(world: World, snapshot: Snapshot, now: float) -> tuple[list[Job], tuple[Decision, ...], Scene]:
    """What the jobs under way call for."""
    rows, wall = world.rows(), world.clock.wall()
    scene = Scene(snapshot=snapshot, rows=rows, reasons=world.reasons, complete=now >= world.complete_at, wall=wall)
    under_way = world.jobs.moving()
    wishes = [_wish(world, job, rows, wall) for job in under_way]
    drained = {wish.node for wish in wishes if wish.requests is None}
    named = {request for wish in wishes for request in wish.requests or ()}
    known = traffic(world, snapshot, rows, now, nodes=drained, requests=named)
    return under_way, decide(snapshot, known, wishes), scene


def _wish(world: World, job: Job, rows: Mapping[RequestId, RequestRow], wall: float) -> Wish:
    tally = world.flights.tally(job.id)
    tally.seen.update(request for request in job.requests if request in rows)
    return moves.wish(job, tally.tried, wall)


def starts(world: World, decisions: tuple[Decision, ...]) -> list[Action]:
    """The replicas that migrations need at their destinations."""
    found: list[Action] = []
    for decision in decisions:
        start, tally = decision.start, world.flights.tally(decision.operation)
        if start is not None and not tally.started:
            tally.started = True
            why = f"{decision.operation} moves requests there"
            found.append(
                StartReplica(
                    deployment=start.deployment,
                    node=start.node,
                    devices=start.devices,
                    priority=Priority.REQUEST,
                    why=why,
                    estimate=start.estimate,
                    candidates=start.candidates,
                )
            )
    return found


async def judge(world: World, job: Job, decision: Decision, scene: Scene) -> None:
    """Note how a job stands; give its orders if it goes on."""
    tally = world.flights.tally(job.id)
    verdict = _VERDICTS[job.operation.kind](job, tally, decision, scene)
    if isinstance(verdict, SllmError):
        await end(world, progress.failed(job, verdict, scene.wall))
    elif verdict.state is not job.operation.state:
        await end(world, replace(job, operation=replace(verdict, updated_at=scene.wall)))
    else:
        _note(world, job, verdict, scene.wall)
        for order in decision.orders:
            _begin(world, scene.snapshot, job, order)


async def end(world: World, job: Job, *others: Op) -> None:
    """A job is over: what it has under way stays where it is. It is stored together with `others`."""
    operation, excess = job.operation, world.jobs.excess()
    log.info("operation %s (%s %s): %s %s", job.id, operation.kind, operation.target, operation.state, operation.error)
    await world.commit([records.put_job(job), *others, *(records.delete_job(old) for old in excess)])
    for old in excess:
        world.jobs.drop(old)
    world.jobs.put(job)
    for migration in world.flights.drop(job.id):
        world.executor.cancel(migration)
    if operation.kind == jobs.DRAIN:
        node = job.nodes[0]
        world.cluster.close(node, replace(world.cluster.cordons[node], draining=False))
    if operation.kind == jobs.DISPLACE and job.replica is not None:
        spare(world, job.replica)
    world.executor.post(Woken())  # what it held is free now


def spare(world: World, replica: ReplicaId) -> None:
    """It is emptied for nobody any more, and left alone for a while. One that is told to end already is not spared."""
    view = world.cluster.replicas.get(replica)
    if view is not None and view.displaced:
        world.cluster.gives_way(replica, None, spared_until=world.clock.monotonic() + SPARED_S)


def _note(world: World, job: Job, operation: Operation, wall: float) -> None:
    if operation != job.operation:
        world.jobs.put(replace(job, operation=replace(operation, updated_at=wall)))


def _begin(world: World, snapshot: Snapshot, job: Job, order: Order) -> None:
    source, target = snapshot.replicas[order.source], snapshot.replicas[order.target]
    sent = MigrationOrder(
        id=MigrationId(make_id("mig", os.urandom(8))),
        replica=order.source,
        generation=source.spec.generation,
        target=target_of(target),
        requests=order.requests,
        concurrency=CONCURRENCY,
        within_s=min(WITHIN_S, max(1.0, job.deadline_at - world.clock.wall())),
        cost=world.forecast.cost(target, snapshot.nodes),
    )
    log.info(
        "%s of %s: %d requests of %s to %s on %s",
        sent.id,
        job.id,
        len(sent.requests),
        sent.replica,
        order.target,
        target.node,
    )
    world.flights.begin(sent, job.id)
    world.executor.migrate(snapshot.nodes[source.node].report.address, sent)


# -- what sources say


def reported(world: World, event: MigrationReported) -> None:
    report = event.report
    flight = world.flights.report(report)
    if flight is None:
        return
    if report.last_round is not None:
        target = world.cluster.replicas.get(flight.order.target.replica)
        if target is not None:
            world.forecast.observe(target, world.cluster.nodes, report.last_round)
    if report.state is MigrationState.MOVED:
        world.loads.moved(report.request, flight.order.target.replica)
    elif report.state is MigrationState.FAILED:
        log.warning("%s of %s failed: %s", report.migration, report.request, report.error)


def ended(world: World, event: MigrationEnded) -> None:
    if event.error is not None:
        log.warning("%s was not carried out: %s", event.migration, event.error)
    world.flights.end(event.migration, event.error, world.clock.monotonic())
