"""An order to migrate, from the agent's service to its engine host and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sllm.agent.service import Agent
from sllm.core.ids import MigrationId, NodeName, ReplicaId, RequestId
from sllm.core.migration import MigrationOrder, MigrationReport, MigrationState
from sllm.core.route import RouteTarget
from sllm.errors import NotFound, StaleGeneration, Unavailable
from sllm.log import LogTail
from sllm.rpc import transport
from sllm.rpc.agents import AgentClient, MigrateCommand, handlers

MakeNode = Callable[..., Any]
MakeSpec = Callable[..., Any]


def order_of(replica: ReplicaId, **changes: Any) -> MigrationOrder:
    target = RouteTarget(
        replica=ReplicaId("rep-2"), node=NodeName("node-2"), address="x:1", generation=1, revision=1, capacity=4
    )
    values: dict[str, Any] = {"id": MigrationId("mig-1"), "replica": replica, "generation": 1, "target": target}
    return MigrationOrder(**{**values, **changes})


def report_of(state: MigrationState) -> MigrationReport:
    return MigrationReport(migration=MigrationId("mig-1"), request=RequestId("req-1"), state=state)


@dataclass
class Serving:
    """A node with one replica that serves, its agent's service on loopback, and a client of it."""

    node: Any
    host: Any
    agent: Agent
    client: AgentClient
    replica: ReplicaId

    def command(self, epoch: int = 1, **changes: Any) -> MigrateCommand:
        return MigrateCommand(epoch=epoch, order=order_of(changes.pop("replica", self.replica), **changes))


@pytest.fixture
async def serving(make_node: MakeNode, make_spec: MakeSpec, model: Path) -> AsyncIterator[Serving]:
    node = make_node()
    spec = make_spec(await node.add(model))
    node.local.replicas.start(spec)
    host = await node.until_host()
    host.become_ready()
    await node.until(lambda: node.state() == "ready")
    local = node.local
    agent = Agent(
        checkpoints=local.checkpoints,
        replicas=local.replicas,
        store=local.store,
        weights=local.weights,
        tail=LogTail(),
        log_folder=node.log_path(spec.id).parent,
    )
    server, port = await transport.serve([handlers(agent)], "127.0.0.1:0", None)
    client = AgentClient(f"127.0.0.1:{port}", None, peer="agent")
    yield Serving(node, host, agent, client, spec.id)
    await client.close()
    await server.stop(None)


async def test_the_engine_hosts_reports_are_passed_on_until_it_has_no_more(serving: Serving) -> None:
    told = [report_of(state) for state in (MigrationState.QUEUED, MigrationState.ROUNDS, MigrationState.MOVED)]
    for report in (*told, None):
        serving.host.reports.put_nowait(report)
    assert [report async for report in serving.client.migrate(serving.command())] == told
    assert serving.host.orders == [order_of(serving.replica)]


async def test_a_controller_that_ends_the_call_cancels_the_order_at_the_host(serving: Serving) -> None:
    serving.host.reports.put_nowait(report_of(MigrationState.ROUNDS))
    async with aclosing(serving.client.migrate(serving.command())) as reports:
        assert (await anext(reports)).state is MigrationState.ROUNDS
    async with asyncio.timeout(10):
        await serving.host.orders_ended.wait()


async def test_the_engine_hosts_own_error_is_kept(serving: Serving) -> None:
    serving.host.reports.put_nowait(Unavailable("rep-1 is stopping"))
    with pytest.raises(Unavailable, match="rep-1 is stopping"):
        await anext(serving.client.migrate(serving.command()))


async def test_orders_are_fenced_and_need_a_replica(serving: Serving) -> None:
    serving.agent.learn_epoch(2)
    for command, error in (
        (serving.command(epoch=1), StaleGeneration),
        (serving.command(epoch=2, generation=7), StaleGeneration),
        (serving.command(epoch=2, replica=ReplicaId("rep-other")), NotFound),
    ):
        with pytest.raises(error):
            await anext(serving.client.migrate(command))
    assert serving.host.orders == []


async def test_a_replica_without_a_host_says_so(serving: Serving) -> None:
    serving.host.die("signal 9")
    await serving.node.until(lambda: serving.node.state() == "failed")
    with pytest.raises(Unavailable, match="failed"):
        await anext(serving.client.migrate(serving.command()))
