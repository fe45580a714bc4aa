"""The agent as a process, while its engine hosts (the fake engine) have requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
from engine.following import Gateway, target_of

from sllm.core.device import DeviceState
from sllm.core.ids import DeviceId, MigrationId, ReplicaId, RequestId
from sllm.core.migration import MigrationOrder, MigrationState
from sllm.core.tokens import TokenRequest
from sllm.errors import EngineFailed, Unavailable
from sllm.rpc.agents import MigrateCommand

pytestmark = pytest.mark.e2e


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    follower = Gateway()
    yield follower
    await follower.close()


def ask(max_tokens: int) -> TokenRequest:
    params = f'{{"max_tokens": {max_tokens}}}'.encode()
    return TokenRequest(stream_id=0, request_id=RequestId("req-1"), token_ids=[5, 6], sampling_params=params)


async def test_an_engine_that_hangs_is_a_failed_replica_and_its_process_is_ended(
    make_agent: Callable[..., Any],
    make_spec: Callable[..., Any],
    model: Path,
    process_end: Callable[[int], Awaitable[None]],
    gateway: Gateway,
) -> None:
    agent = make_agent(env={"SLLM_FAKE_TOKEN_S": "3600"}, stall_s=0.1)
    await agent.start()
    await agent.start_replica(make_spec((await agent.add(model)).digest, devices=(DeviceId("cpu-0"),)))
    status = await agent.replica_in("ready")
    followed = gateway.send(target_of(status.spec, status.address), ask(9))
    status = await agent.replica_in("failed")
    assert (status.error, status.error_reason) == ("the engine made no step for 0.1 s", "ENGINE_FAILED")
    with suppress(Unavailable):  # the process may be gone before that has been sent
        await gateway.finished(followed)
        assert followed.finish is not None
        assert isinstance(followed.finish.error, EngineFailed)
    await process_end(status.pid)
    await agent.controller.until(lambda r: [device.state for device in r.devices] == [DeviceState.FREE])


async def test_a_host_that_was_found_again_carries_out_orders_to_migrate(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], model: Path, gateway: Gateway
) -> None:
    agent = make_agent(env={"SLLM_FAKE_TOKEN_S": "0.5"}, devices=2, grace_s=20.0)
    await agent.start()
    digest = (await agent.add(model)).digest
    for n in (0, 1):
        await agent.start_replica(make_spec(digest, id=ReplicaId(f"rep-{n}"), devices=(DeviceId(f"cpu-{n}"),)))
    report = await agent.controller.until(lambda r: [each.state for each in r.replicas] == ["ready", "ready"])
    replicas = sorted(report.replicas, key=lambda each: each.spec.id)
    source, destination = (target_of(each.spec, each.address) for each in replicas)
    followed = gateway.send(source, ask(100))
    await gateway.until(lambda: followed.tokens)
    await agent.kill()
    await agent.start()
    order = MigrationOrder(id=MigrationId("mig-1"), replica=source.replica, generation=1, target=destination)
    async with aclosing(agent.client.migrate(MigrateCommand(epoch=1, order=order))) as reports:
        last = [each async for each in reports][-1]
    assert last.state is MigrationState.MOVED, last
    await gateway.until(lambda: followed.moves and len(followed.tokens) > followed.moves[0][0])
