"""ControlService: what operators ask. Changes go through the writer; questions are answered from the world as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

from sllm.controller import changes, explaining, moves, moving, status
from sllm.controller.describing import describe
from sllm.controller.dry_runs import dry_run
from sllm.controller.inbox import Inbox
from sllm.controller.world import World
from sllm.core.decision import DeploymentPlan, Explanation
from sllm.core.description import ClusterDescription
from sllm.core.ids import NodeName, ReplicaId
from sllm.core.migration import MigrationPlan
from sllm.core.operation import Operation
from sllm.core.snapshot import Snapshot
from sllm.errors import NotFound
from sllm.rpc.agents import AgentReadLogsRequest
from sllm.rpc.control import (
    AddCheckpointRequest,
    CheckpointList,
    ClusterStatus,
    CordonRequest,
    DeleteRequest,
    DeployRequest,
    DrainRequest,
    Empty,
    ExplainRequest,
    LogChunk,
    MigrateRequest,
    ReadLogsRequest,
    RemoveCheckpointRequest,
    RequestList,
    ScaleRequest,
    VerifyCheckpointRequest,
    WatchOperationRequest,
)
from sllm.scheduler import autoscale


class ControllerControl:
    """Implements rpc.control.ControlService."""

    def __init__(self, world: World, inbox: Inbox) -> None:
        self._world = world
        self._inbox = inbox

    async def add_checkpoint(self, request: AddCheckpointRequest) -> Operation:
        return await self._operation(request)

    async def remove_checkpoint(self, request: RemoveCheckpointRequest) -> Operation:
        return await self._operation(request)

    async def verify_checkpoint(self, request: VerifyCheckpointRequest) -> Operation:
        return await self._operation(request)

    async def deploy(self, request: DeployRequest) -> Operation:
        return await self._operation(request)

    async def plan_deploy(self, request: DeployRequest) -> DeploymentPlan:
        world, snapshot = self._world, self._snapshot()
        changed = changes.deployed(snapshot, request.spec, world.clock.wall())
        return dry_run(snapshot, changed, world.clock.monotonic())

    async def delete(self, request: DeleteRequest) -> Operation:
        return await self._operation(request)

    async def scale(self, request: ScaleRequest) -> Operation:
        return await self._operation(request)

    async def plan_scale(self, request: ScaleRequest) -> DeploymentPlan:
        world, snapshot = self._world, self._snapshot()
        changed = changes.scaled(changes.found(snapshot, request.name), request, world.clock.wall())
        let_go = autoscale.surplus(snapshot, changed, world.cluster.of(changed.name), request.replicas)
        return dry_run(snapshot, changed, world.clock.monotonic(), let_go=let_go)

    async def migrate(self, request: MigrateRequest) -> Operation:
        return await self._operation(request)

    async def plan_migration(self, request: MigrateRequest) -> MigrationPlan:
        world, snapshot, rows = self._world, self._snapshot(), self._world.rows()
        requests = moves.requests_to_move(snapshot, rows, request)
        known = moving.traffic(world, snapshot, rows, world.clock.monotonic(), nodes=(), requests=requests)
        return moves.plan_migration(snapshot, known, requests, request)

    async def drain(self, request: DrainRequest) -> Operation:
        return await self._operation(request)

    async def plan_drain(self, request: DrainRequest) -> MigrationPlan:
        world, snapshot, now = self._world, self._snapshot(), self._world.clock.monotonic()
        known = moving.traffic(world, snapshot, world.rows(), now, nodes=(request.node,), requests=())
        return moves.plan_drain(snapshot, known, request, now)

    async def cordon(self, request: CordonRequest) -> Empty:
        return cast(Empty, await self._inbox.submit(request))

    def watch_operation(self, request: WatchOperationRequest) -> AsyncIterator[Operation]:
        return self._world.jobs.follow(request.id)

    async def list_checkpoints(self, request: Empty) -> CheckpointList:
        return status.checkpoint_list(self._snapshot(), self._world.forecast)

    async def get_status(self, request: Empty) -> ClusterStatus:
        world = self._world
        now = world.clock.monotonic()
        return status.cluster_status(world.snapshot(now), world.reasons, world.estimator.error, now)

    async def list_requests(self, request: Empty) -> RequestList:
        return status.request_list(self._world.rows().values(), self._world.cluster.replicas)

    async def explain(self, request: ExplainRequest) -> Explanation:
        return explaining.explain(self._world, request.target)

    async def describe_cluster(self, request: Empty) -> ClusterDescription:
        world = self._world
        now = world.clock.monotonic()
        return describe(world.snapshot(now), world.rows().values(), world.forecast, now)

    async def read_logs(self, request: ReadLogsRequest) -> AsyncIterator[LogChunk]:
        node, replica = self._located(request.target)
        client = self._world.executor.client(self._world.cluster.nodes[node].report.address)
        async for chunk in client.read_logs(AgentReadLogsRequest(replica=replica, lines=request.lines)):
            yield chunk

    def _located(self, target: str) -> tuple[NodeName, str]:
        if target.startswith("rep-"):
            replica = self._world.cluster.replicas.get(ReplicaId(target))
            if replica is None:
                raise NotFound(f"no replica {target!r}", hint="see `sllm status`; the node's own log may say more")
            return replica.node, target
        if target not in self._world.cluster.nodes:
            raise NotFound(f"no node {target!r}", hint="see `sllm nodes`; a replica's id begins with rep-")
        return NodeName(target), ""

    def _snapshot(self) -> Snapshot:
        return self._world.snapshot(self._world.clock.monotonic())

    async def _operation(self, request: object) -> Operation:
        return cast(Operation, await self._inbox.submit(request))
