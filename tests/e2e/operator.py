"""An operator whose commands arrive within milliseconds: the CLI's client, without the CLI's start-up."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from e2e.cluster import Cluster

from sllm.cli import context as contexts
from sllm.config import TlsConfig, check
from sllm.core.description import ClusterDescription
from sllm.core.ids import NodeName, ReplicaId, RequestId, make_id
from sllm.core.operation import Operation, OperationState
from sllm.core.replica import ReplicaState
from sllm.errors import SllmError
from sllm.rpc.control import ControlClient, Empty, MigrateRequest, ReplicaRow, WatchOperationRequest
from sllm.rpc.identity import load_tls

T = TypeVar("T")


class Operator:
    """Lives in a thread with an event loop of its own; every method may be called from anywhere."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="operator", daemon=True)

    def __enter__(self) -> Operator:
        self._thread.start()
        self._client = self._run(self._connect())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def nodes(self) -> list[NodeName]:
        return [node.report.name for node in self._run(self._client.get_status(Empty())).nodes]

    def ready(self, deployment: str) -> list[ReplicaRow]:
        """The replicas of a deployment that are ready."""
        rows = self._run(self._client.get_status(Empty())).replicas
        ready = [row for row in rows if row.status.state is ReplicaState.READY]
        return [row for row in ready if row.status.spec.deployment == deployment]

    def node_of(self, request: str) -> NodeName | None:
        """Where a request runs, as far as the controller has heard."""
        rows = self._run(self._client.list_requests(Empty())).requests
        return next((row.node for row in rows if row.id == request), None)

    def running(self, deployment: str) -> str | None:
        """The first request of a deployment that runs, as far as the controller has heard."""
        rows = self._run(self._client.list_requests(Empty())).requests
        return next((row.id for row in rows if row.deployment == deployment and row.replica), None)

    def describe(self) -> ClusterDescription:
        return self._run(self._client.describe_cluster(Empty()))

    def moves(self, request: str, node: str) -> bool:
        """Move a request; False if it did not: it is there already, or over, or not known yet."""
        return self._has_moved(node=NodeName(node), request=RequestId(request))

    def moves_all(self, replica: str, node: str) -> bool:
        """Move all that runs on a replica; False if nothing did."""
        return self._has_moved(node=NodeName(node), replica=ReplicaId(replica))

    def _has_moved(self, **fields: Any) -> bool:
        try:
            done = self._run(self._migrate(self._request(**fields)))
        except SllmError:
            return False
        return done.state is OperationState.DONE and not done.phase.startswith("0 moved")

    def migrate(self, request: str, node: NodeName) -> Operation:
        """Move a request, and return the operation when it is over. Raises what the controller refuses with."""
        return self._run(self._migrate(self._request(node=node, request=RequestId(request))))

    @staticmethod
    def _request(**fields: Any) -> MigrateRequest:
        return MigrateRequest(request_id=make_id("test", os.urandom(8)), **fields)

    async def _migrate(self, asked: MigrateRequest) -> Operation:
        operation = await self._client.migrate(asked)
        async for latest in self._client.watch_operation(WatchOperationRequest(id=operation.id)):
            operation = latest
        return operation

    async def _connect(self) -> ControlClient:
        known = contexts.load(Path(self._cluster.home) / "config.toml")
        chosen = contexts.resolve(known, context=None, controller=None, env={})
        paths = {"ca": chosen.ca, "certificate": chosen.certificate, "key": chosen.key}
        tls = load_tls(check(paths, TlsConfig, origin="the context"))
        return ControlClient(chosen.controller, tls, peer="the controller")

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)
