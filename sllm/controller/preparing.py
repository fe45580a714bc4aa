"""Carries out where checkpoints are to lie before anybody asks for them: nodes read ahead, and get copies."""

from __future__ import annotations

import logging

from sllm.controller import jobs
from sllm.controller.world import World
from sllm.core.ids import ReplicaId
from sllm.core.snapshot import Snapshot
from sllm.scheduler import residency
from sllm.scheduler.residency_plan import CopyCheckpoint, Prefetch

log = logging.getLogger(__name__)


async def prepare(world: World, snapshot: Snapshot, now: float) -> None:
    """Decide again, if the last time is long enough ago; else that is due then."""
    if not residency.enabled(snapshot):
        return
    world.prepare_due = now < world.prepare_at
    if world.prepare_due:
        return
    world.prepare_at = now + residency.EVERY_S
    copying = any(job.operation.kind in jobs.ON_CHECKPOINTS for job in world.jobs.running())
    plan = residency.decide(snapshot, world.recent, now, copying=copying)
    world.recent.note(plan, now)
    for prefetch in plan.prefetches:
        _prefetch(world, snapshot, prefetch)
    for copy in plan.copies:
        await _copy(world, copy)


def wake_at(world: World, now: float) -> float | None:
    """When to pass again, though nothing happens: something has since the last decision."""
    return world.prepare_at if world.prepare_due and now < world.prepare_at else None


def _prefetch(world: World, snapshot: Snapshot, prefetch: Prefetch) -> None:
    revision = snapshot.deployments[prefetch.deployment].current
    log.info("%s reads %s ahead: %s", prefetch.node, revision.deployment.spec.checkpoint, prefetch.why)
    spec = revision.replica(id=ReplicaId(""), generation=0, devices=prefetch.devices)
    world.executor.prefetch(snapshot.nodes[prefetch.node].report.address, spec, prefetch.instead_of)


async def _copy(world: World, copy: CopyCheckpoint) -> None:
    """As if somebody had added it there: progress, outcome and a restart of the controller are the same."""
    log.info("%s gets a copy of %s: %s", copy.node, copy.checkpoint, copy.why)
    job = jobs.new_job(jobs.ADD, copy.checkpoint, wall=world.clock.wall(), source=copy.source, nodes=(copy.node,))
    await world.commit_job([], job)
