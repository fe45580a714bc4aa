"""A cluster around the gateway under test, in this process."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
from gateway.fake_processes import FakeAgent, FakeController, FakeHost

from sllm.config import GatewayConfig
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.ids import CheckpointName, DeploymentName, NodeName, ReplicaId
from sllm.core.route import Route, RouteTarget
from sllm.gateway.dispatch import Dispatcher
from sllm.gateway.execution_files import ExecutionFiles
from sllm.gateway.main import Gateway
from sllm.gateway.server import listen
from sllm.rpc import agents, engine, routes
from sllm.rpc.transport import serve


def make_route(name: str = "m", *targets: RouteTarget, **changes: Any) -> Route:
    spec = DeploymentSpec(
        name=DeploymentName(name),
        checkpoint=CheckpointName("c"),
        max_replicas=4,
        engine_args=changes.pop("engine_args", {}),
    )
    deployment = Deployment(
        spec=spec,
        revision=changes.pop("revision", 1),
        digest=changes.pop("digest", "sha256-1"),
        created_at=1000.0,
        updated_at=1000.0,
        deleting=changes.pop("deleting", False),
    )
    return replace(Route(deployment=deployment, max_model_len=512, targets=targets), **changes)


class Cluster:
    """Everything a test touches. `http` is a client of the gateway's base URL."""

    def __init__(self) -> None:
        self.controller = FakeController()
        self.agent = FakeAgent()
        self.hosts: dict[str, FakeHost] = {}
        self.servers: dict[str, tuple[grpc.aio.Server, str]] = {}
        self.agent_address = ""
        self.address = ""
        self.gateway: Gateway
        self.builder: Any = None
        self.http: httpx.AsyncClient
        self.stop = asyncio.Event()
        self.serving: asyncio.Task[None]

    async def host(self, name: str = "rep-1", **changes: Any) -> tuple[FakeHost, RouteTarget]:
        """Start an engine host that answers at once; `go` of it can be cleared."""
        capacity, revision = changes.pop("capacity", 8), changes.pop("revision", 1)
        host = FakeHost(**changes)
        host.go.set()
        server, port = await serve([engine.handlers(host)], "127.0.0.1:0", None)
        self.hosts[name], self.servers[name] = host, (server, f"127.0.0.1:{port}")
        return host, self.target(name, capacity=capacity, revision=revision)

    def target(self, name: str, *, capacity: int = 8, revision: int = 1) -> RouteTarget:
        return RouteTarget(
            replica=ReplicaId(name),
            node=NodeName("node-1"),
            address=self.servers[name][1],
            generation=1,
            revision=revision,
            capacity=capacity,
        )

    async def publish(self, *table: Route, epoch: int = 1) -> None:
        """Publish a route table, and return when the gateway has it."""
        taken = asyncio.Event()
        self.gateway._routes.subscribe(taken.set)
        await self.controller.publish(*table, epoch=epoch)
        await asyncio.wait_for(taken.wait(), 10)

    @asynccontextmanager
    async def raw_post(
        self, path: str, document: object, *, within_s: float = 10
    ) -> AsyncIterator[asyncio.StreamReader]:
        """Post without an HTTP library, to read the answer exactly as it comes."""
        reader, writer = await asyncio.open_connection(*self.address.split(":"))
        body = json.dumps(document).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        writer.write(f"{head}\r\n".encode() + body)
        try:
            async with asyncio.timeout(within_s):
                yield reader
        finally:
            writer.close()
            await writer.wait_closed()


Start = Callable[..., Awaitable[Cluster]]


@asynccontextmanager
async def running_cluster(
    folder: Path, make_builder: Callable[[ExecutionFiles, Dispatcher], Any], **settings: Any
) -> AsyncIterator[Cluster]:
    cluster = Cluster()
    controller, port = await serve([routes.handlers(cluster.controller)], "127.0.0.1:0", None)
    agent, agent_port = await serve([agents.handlers(cluster.agent)], "127.0.0.1:0", None)
    cluster.agent_address = f"127.0.0.1:{agent_port}"
    config = GatewayConfig(
        listen="127.0.0.1:0", controller=f"127.0.0.1:{port}", state_dir=folder / "gateway", **settings
    )

    def keep_builder(files: ExecutionFiles, dispatcher: Dispatcher) -> Any:
        cluster.builder = make_builder(files, dispatcher)
        return cluster.builder

    sock = listen(config.listen)
    cluster.address = "{}:{}".format(*sock.getsockname())
    cluster.gateway = Gateway(config, None, keep_builder)
    cluster.serving = asyncio.create_task(cluster.gateway.serve(sock, cluster.stop))
    cluster.http = httpx.AsyncClient(base_url=f"http://{cluster.address}", timeout=20, trust_env=False)
    try:
        yield cluster
    finally:
        await cluster.http.aclose()
        cluster.stop.set()
        await cluster.serving
        for server, _ in cluster.servers.values():
            await server.stop(None)
        await controller.stop(None)
        await agent.stop(None)
