"""Handlers: how each event changes the world. Run by the writer, one at a time.

What must survive a restart is stored before memory changes and before the answer goes out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from sllm.controller import changes, checkpoints, jobs, moves, moving, progress, records, reports
from sllm.controller.events import (
    Asked,
    CommandEnded,
    CopyEnded,
    CopyProgressed,
    Left,
    MigrationEnded,
    MigrationReported,
    Registered,
    Watched,
    Woken,
)
from sllm.controller.jobs import Job
from sllm.controller.router import Waiter
from sllm.controller.routes import targets
from sllm.controller.waits import Wait
from sllm.controller.world import World
from sllm.core.ids import DeploymentName
from sllm.core.node import OPEN
from sllm.core.operation import Operation
from sllm.core.request import RequestRow, RequestState
from sllm.core.snapshot import Command, DeploymentView, Intent
from sllm.errors import Cancelled, NotFound
from sllm.rpc.control import (
    AddCheckpointRequest,
    CordonRequest,
    DeleteRequest,
    DeployRequest,
    DrainRequest,
    Empty,
    MigrateRequest,
    RemoveCheckpointRequest,
    ScaleRequest,
    VerifyCheckpointRequest,
)
from sllm.rpc.nodes import HeartbeatRequest
from sllm.rpc.routes import ReportLoadRequest
from sllm.scheduler import autoscale, retry


class Handlers:
    def __init__(self, world: World) -> None:
        self._world = world
        self._by_type: dict[type, Callable[[Any], Awaitable[Any]]] = {
            Asked: self._asked,
            Left: self._left,
            Registered: self._registered,
            HeartbeatRequest: self._heartbeat,
            ReportLoadRequest: self._load,
            Watched: self._watched,
            CommandEnded: self._command_ended,
            DeployRequest: self._deploy,
            DeleteRequest: self._delete,
            ScaleRequest: self._scale,
            AddCheckpointRequest: self._add_checkpoint,
            RemoveCheckpointRequest: self._remove_checkpoint,
            VerifyCheckpointRequest: self._verify_checkpoint,
            MigrateRequest: self._migrate,
            DrainRequest: self._drain,
            CordonRequest: self._cordon,
            MigrationReported: self._migration_reported,
            MigrationEnded: self._migration_ended,
            CopyProgressed: self._copy_progressed,
            CopyEnded: self._copy_ended,
            Woken: self._woken,
        }

    async def handle(self, event: object) -> Any:
        """Apply one event and return its answer. Raises what the asker is to be told."""
        return await self._by_type[type(event)](event)

    async def _woken(self, event: Woken) -> None:
        """The plan that follows every batch of events is all there is to do."""

    # -- gateways

    async def _asked(self, event: Asked) -> None:
        world, request, now = self._world, event.ticket.request, self._world.clock.monotonic()
        name = request.deployment
        view = world.cluster.deployments.get(name)
        if view is None or view.current.deployment.deleting:
            raise NotFound(f"no deployment {name!r}", hint="see /v1/models")
        if refusal := self._refusal(view, now):
            raise refusal
        waiter = Waiter(
            ticket=event.ticket.number,
            row=RequestRow(
                id=request.request_id,
                deployment=name,
                state=RequestState.HELD,
                prompt_tokens=request.prompt_tokens,
                started_at=request.started_at,
            ),
            gateway=request.gateway,
            since=now,
            deadline=now + request.timeout_s,
        )
        world.router.add(waiter)
        world.tickets[event.ticket.number] = event.ticket
        grant_held(world, name, now)

    def _refusal(self, view: DeploymentView, now: float) -> Exception | None:
        if any(replica.live for replica in self._world.cluster.of(view.name)):
            return None
        return retry.refusal(view, now) or retry.damage(view, self._world.cluster.nodes.values())

    async def _left(self, event: Left) -> None:
        world = self._world
        world.tickets.pop(event.ticket, None)
        world.router.remove(event.ticket)
        if not event.served:
            world.loads.released(event.ticket)

    async def _load(self, event: ReportLoadRequest) -> None:
        world, now = self._world, self._world.clock.monotonic()
        for name, count in world.loads.news(event.gateway, event.incarnation, event.requests, event.finished).items():
            if name in world.cluster.deployments:
                world.cluster.asked(name, count, now)
        for row in world.loads.report(event.gateway, event.incarnation, event.requests, now):
            world.forecast.finished(row)
        self._world.touched.update(DeploymentName(name) for name, count in event.finished.items() if count)

    async def _watched(self, event: Watched) -> None:
        self._world.loads.watched(event.gateway, begins=event.begins)

    # -- agents

    async def _registered(self, event: Registered) -> Any:
        return await reports.registered(self._world, event)

    async def _heartbeat(self, event: HeartbeatRequest) -> Any:
        return await reports.heartbeat(self._world, event)

    async def _command_ended(self, event: CommandEnded) -> None:
        reports.command_ended(self._world, event)

    # -- operators

    async def _deploy(self, event: DeployRequest) -> Operation:
        if asked := self._asked_before(event.request_id):
            return asked
        world, wall = self._world, self._world.clock.wall()
        view = changes.deployed(world.snapshot(world.clock.monotonic()), event.spec, wall)
        job = self._job(event.request_id, jobs.DEPLOY, view.name, revision=view.current.number)
        await self._world.commit_job([records.put_deployment(view)], job)
        world.cluster.deployments[view.name] = view
        return job.operation

    async def _delete(self, event: DeleteRequest) -> Operation:
        if asked := self._asked_before(event.request_id):
            return asked
        world = self._world
        snapshot = world.snapshot(world.clock.monotonic())
        view = changes.deleted(changes.found(snapshot, event.name), world.clock.wall())
        job = self._job(event.request_id, jobs.DELETE, view.name)
        await self._world.commit_job([records.put_deployment(view)], job)
        world.cluster.deployments[view.name] = view
        for waiter in world.router.empty(view.name):
            world.tickets[waiter.ticket].fail(NotFound(f"deployment {view.name!r} was deleted"))
        return job.operation

    async def _scale(self, event: ScaleRequest) -> Operation:
        if asked := self._asked_before(event.request_id):
            return asked
        world = self._world
        snapshot = world.snapshot(world.clock.monotonic())
        view = changes.scaled(changes.found(snapshot, event.name), event, world.clock.wall())
        job = self._job(event.request_id, jobs.SCALE, view.name, revision=view.current.number)
        await self._world.commit_job([records.put_deployment(view)], job)
        world.cluster.deployments[view.name] = view
        for replica in autoscale.surplus(snapshot, view, world.cluster.of(view.name), event.replicas):
            intent = Intent.DRAIN if replica.ready else Intent.STOP
            world.cluster.intend(replica.spec.id, intent, Command.DUE)
        return job.operation

    async def _add_checkpoint(self, event: AddCheckpointRequest) -> Operation:
        if asked := self._asked_before(event.request_id):
            return asked
        snapshot = self._world.snapshot(self._world.clock.monotonic())
        nodes = checkpoints.nodes_to_add(snapshot, event)
        return await self._copy(self._job(event.request_id, jobs.ADD, event.name, source=event.source, nodes=nodes))

    async def _remove_checkpoint(self, event: RemoveCheckpointRequest) -> Operation:
        if asked := self._asked_before(event.request_id):
            return asked
        snapshot = self._world.snapshot(self._world.clock.monotonic())
        nodes = checkpoints.nodes_to_remove(snapshot, event)
        return await self._copy(self._job(event.request_id, jobs.REMOVE, event.name, nodes=nodes))

    async def _verify_checkpoint(self, event: VerifyCheckpointRequest) -> Operation:
        if asked := self._asked_before(event.request_id):
            return asked
        snapshot = self._world.snapshot(self._world.clock.monotonic())
        nodes = checkpoints.nodes_to_verify(snapshot, event)
        return await self._copy(self._job(event.request_id, jobs.VERIFY, event.name, nodes=nodes, deep=event.deep))

    async def _migrate(self, event: MigrateRequest) -> Operation:
        if asked := self._asked_before(event.request_id):
            return asked
        world, now, rows = self._world, self._world.clock.monotonic(), self._world.rows()
        snapshot = world.snapshot(now)
        requests = moves.requests_to_move(snapshot, rows, event)
        known = moving.traffic(world, snapshot, rows, now, nodes=(), requests=requests)
        moves.checked(snapshot, known, requests, event.node)
        target = event.request or event.replica or ""
        deadline_at = world.clock.wall() + moving.MIGRATE_S
        fields = {"nodes": (event.node,), "requests": requests, "replica": event.replica, "deadline_at": deadline_at}
        job = moves.joined(world.jobs.moving(), self._job(event.request_id, jobs.MIGRATE, target, **fields))
        await self._world.commit_job([], job)
        return job.operation

    async def _drain(self, event: DrainRequest) -> Operation:
        if asked := self._asked_before(event.request_id):
            return asked
        world, node = self._world, event.node
        moves.check_drain(world.snapshot(world.clock.monotonic()), event)
        deadline_at = world.clock.wall() + event.deadline_s
        job = self._job(event.request_id, jobs.DRAIN, node, nodes=(node,), deadline_at=deadline_at)
        job = moves.joined(world.jobs.moving(), job)
        cordon = replace(world.cluster.cordons.get(node, OPEN), node=True, draining=True)
        await self._world.commit_job([records.put_node(node, cordon)], job)
        world.cluster.close(node, cordon)
        return job.operation

    async def _cordon(self, event: CordonRequest) -> Empty:
        world, node = self._world, event.node
        before = world.cluster.cordons.get(node, OPEN)
        cordon = moves.cordoned(world.snapshot(world.clock.monotonic()), before, event)
        stored, drain = records.put_node(node, cordon), world.jobs.drain_of(node)
        if drain is not None and not cordon.draining:
            error = Cancelled(f"node {node!r} was uncordoned", hint="what was moved stays where it went")
            await moving.end(world, progress.failed(drain, error, world.clock.wall()), stored)
        else:
            await world.commit([stored])
        world.cluster.close(node, cordon)
        return Empty()

    async def _migration_reported(self, event: MigrationReported) -> None:
        moving.reported(self._world, event)

    async def _migration_ended(self, event: MigrationEnded) -> None:
        moving.ended(self._world, event)

    async def _copy(self, job: Job) -> Operation:
        """Begin to work on a checkpoint's copies, or join who does the same already. One job at a time has the name."""
        job = checkpoints.joined(self._world.jobs.copying(job.operation.target), job)
        await self._world.commit_job([], job)
        return job.operation

    async def _copy_progressed(self, event: CopyProgressed) -> None:
        job = self._world.jobs.get(event.operation)
        if job and job.running and job.done_on is None:
            operation = replace(
                job.operation, phase=event.phase, progress=event.progress, updated_at=self._world.clock.wall()
            )
            self._world.jobs.put(replace(job, operation=operation))

    async def _copy_ended(self, event: CopyEnded) -> None:
        job = self._world.jobs.get(event.operation)
        if job is None or not job.running:
            return
        if event.error is None:
            self._world.jobs.put(replace(job, done_on=event.done_on))
            return
        job = progress.failed(job, event.error, self._world.clock.wall())
        await self._world.commit([records.put_job(job)])
        self._world.jobs.put(job)

    def _asked_before(self, request_id: str) -> Operation | None:
        job = self._world.jobs.asked(request_id)
        return job.operation if job else None

    def _job(self, request_id: str, kind: str, target: str, **fields: Any) -> Job:
        return jobs.new_job(kind, target, wall=self._world.clock.wall(), request_id=request_id, **fields)


def grant_held(world: World, name: DeploymentName, now: float) -> None:
    """Send waiting requests of a deployment to replicas that have room."""
    ready = targets(world.cluster.of(name))
    if not ready:
        return
    for grant in world.router.grant(name, ready, world.loads.per_replica()):
        waiter = grant.waiter
        running = replace(waiter.row, state=RequestState.RUNNING, replica=grant.target.replica)
        world.loads.granted(waiter.ticket, gateway=waiter.gateway, row=running, now=now)
        world.tickets[waiter.ticket].grant(grant.target)
        wall = world.clock.wall()
        wait = Wait(deployment=name, replica=grant.target.replica, held_at=wall - (now - waiter.since), granted_at=wall)
        world.waits.granted(waiter.row.id, wait)
