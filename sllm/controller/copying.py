"""Begins the copies that operations ask for: picks the nodes, and hands the work to the executor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sllm.controller import checkpoints, copies, jobs
from sllm.controller.copies import Holder
from sllm.controller.events import CopyEnded
from sllm.controller.jobs import Job
from sllm.controller.world import World
from sllm.core.ids import NodeName
from sllm.core.node import NodeState
from sllm.core.snapshot import NodeView, Snapshot
from sllm.errors import Unavailable


def begin(world: World, snapshot: Snapshot) -> None:
    """Begin what was asked for, or was under way before a restart (agents attach to work that they know)."""
    if not snapshot.settled:
        return
    for job in world.jobs.running():
        if not job.started and job.operation.kind in jobs.ON_CHECKPOINTS:
            job = replace(job, started=True)
            world.jobs.put(job)
            _begin(world, snapshot, job)


def _begin(world: World, snapshot: Snapshot, job: Job) -> None:
    missing = [node for node in job.nodes if not _is_there(snapshot, node)]
    views = [snapshot.nodes[node] for node in job.nodes if node not in missing]
    if missing or (not views and not _any_ready(snapshot)):
        where = f"node {missing[0]!r} is not there" if missing else "no node is ready"
        world.executor.post(CopyEnded(operation=job.id, error=Unavailable(where, hint="see `sllm nodes`")))
        return
    post, epoch = world.executor.post, world.executor.epoch
    if job.operation.kind == jobs.REMOVE:
        world.executor.spawn(copies.remove(job, _holders(world, views, job), epoch, post))
        return
    if job.operation.kind == jobs.VERIFY:
        world.executor.spawn(copies.verify(job, _holders(world, views, job), epoch, post))
        return
    known = snapshot.checkpoints().get(job.operation.target)
    digest = known.digest if known else ""
    if views:
        work = copies.add_to_all(job, _holders(world, views, job), digest, epoch, post)
    else:
        by_space = checkpoints.by_free_space(snapshot)
        work = copies.add_to_first(job, _holders(world, by_space, job), digest, epoch, post)
    world.executor.spawn(work)


def _holders(world: World, views: Iterable[NodeView], job: Job) -> list[Holder]:
    return [
        Holder(
            node=view.report.name,
            client=world.executor.client(view.report.address),
            digest=next((c.digest for c in view.report.checkpoints if c.name == job.operation.target), ""),
        )
        for view in views
    ]


def _is_there(snapshot: Snapshot, node: NodeName) -> bool:
    view = snapshot.nodes.get(node)
    return view is not None and view.state is not NodeState.DEAD


def _any_ready(snapshot: Snapshot) -> bool:
    return any(view.state is NodeState.READY for view in snapshot.nodes.values())
