"""Carries out displacements: replicas that are emptied because another deployment waits for their devices.

They are jobs of the controller's own, in memory while they run: one that begins anew looks at what waits then. Their
orders are those of migrations and drains (`moving`).
"""

from __future__ import annotations

import logging
from dataclasses import replace

from sllm.controller import jobs, moving, progress
from sllm.controller.world import World
from sllm.core.ids import ReplicaId, RequestId
from sllm.core.migration import Outlook
from sllm.core.request import RequestState
from sllm.core.snapshot import Snapshot
from sllm.errors import Cancelled
from sllm.scheduler.plan import MoveRequests

log = logging.getLogger(__name__)

# With the start of a replica for what is moved.
DISPLACE_S = 120.0


def foreseen(world: World, snapshot: Snapshot) -> Snapshot:
    """With what is expected of all that runs, if requests are held that it might give way to."""
    if not snapshot.held:
        return snapshot
    running: dict[ReplicaId, dict[RequestId, Outlook]] = {}
    for row in world.rows().values():
        replica = snapshot.replicas.get(row.replica) if row.replica else None
        if row.state is RequestState.RUNNING and replica is not None:
            running.setdefault(replica.spec.id, {})[row.id] = world.forecast.outlook(row, snapshot)
    return replace(snapshot, running=running)


def begin(world: World, action: MoveRequests) -> None:
    """Send nothing new to a replica; what runs on it is moved by the passes that follow."""
    view, wall = world.cluster.replicas[action.replica], world.clock.wall()
    job = jobs.new_job(
        jobs.DISPLACE,
        action.replica,
        wall=wall,
        phase=action.why,
        nodes=(view.node,),
        replica=action.replica,
        deadline_at=wall + DISPLACE_S,
        why=action.why,
    )
    log.info("empty %s of %s on %s (%s): %s", action.replica, view.spec.deployment, view.node, job.id, action.why)
    world.cluster.gives_way(action.replica, action.room_for)
    world.jobs.put(job)


async def give_up(world: World, replica: ReplicaId, why: str) -> None:
    """Nobody waits for its devices any more: it stays, with what has not moved yet."""
    job = next((j for j in world.jobs.moving() if j.operation.kind == jobs.DISPLACE and j.replica == replica), None)
    if job is None:
        moving.spare(world, replica)
    else:
        error = Cancelled(why, hint="what was moved stays where it went")
        await moving.end(world, progress.failed(job, error, world.clock.wall()))
