"""Engine hosts that die at each step of the protocol: whoever holds prompt and output resumes the request elsewhere,
and nothing is lost or repeated (paper §5)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from engine.following import Gateway, target_of

from sllm.core.ids import MigrationId, ReplicaId, RequestId
from sllm.core.launch import LaunchRecord
from sllm.core.migration import MigrationOrder, MigrationReport, MigrationState
from sllm.core.route import RouteTarget
from sllm.errors import Unavailable
from sllm.rpc.engine import EngineClient

pytestmark = pytest.mark.e2e

Make = Callable[..., Any]
AT_SOURCE = ("migrate-begin", "round-sent", "round-answered", "before-handover", "after-handover")
AT_DESTINATION = ("recompute-begun", "recompute-done")
PROMPT = list(range(3, 43))
TOKENS = 200


@dataclass
class Running:
    """An engine host as a process."""

    client: EngineClient
    record: LaunchRecord

    @property
    def target(self) -> RouteTarget:
        return target_of(self.record.spec, self.record.address)


@dataclass
class Pair:
    source: Running
    destination: Running
    warm: Any
    armed: Path

    async def migrate(self) -> list[MigrationReport]:
        spec = self.source.record.spec
        order = MigrationOrder(
            id=MigrationId("mig-1"), replica=spec.id, generation=spec.generation, target=self.destination.target
        )
        async with aclosing(self.source.client.migrate(order)) as reports:
            return [report async for report in reports]


@pytest.fixture
async def pair(warm: Make, make_launch: Make, settled: Make, tmp_path: Path) -> AsyncIterator[Pair]:
    armed = tmp_path / "armed"
    forker = warm(SLLM_FAKE_TOKEN_S="0.01", SLLM_FAILPOINT=f"@{armed}")
    hosts = []
    for name in ("a", "b"):
        launch = make_launch(id=ReplicaId(f"rep-{name}"))
        record = await forker.fork(launch)
        client = EngineClient(record.address, None, peer=f"engine host {name}")
        await settled(client, launch.nonce)
        hosts.append(Running(client, record))
    yield Pair(hosts[0], hosts[1], forker, armed)
    for host in hosts:
        await host.client.close()


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    follower = Gateway()
    yield follower
    await follower.close()


async def undisturbed(gateway: Gateway, host: Running, request: Any) -> list[int]:
    followed = gateway.send(host.target, replace(request, request_id=RequestId("req-undisturbed")))
    await gateway.finished(followed)
    return followed.tokens


@pytest.mark.parametrize("failpoint", AT_SOURCE)
async def test_when_the_source_dies_what_it_had_sent_goes_on_at_the_destination(
    pair: Pair, gateway: Gateway, request_of: Make, failpoint: str
) -> None:
    request = request_of(1, PROMPT, max_tokens=TOKENS)
    expected = await undisturbed(gateway, pair.destination, request)
    followed = gateway.send(pair.source.target, request)
    await gateway.until(lambda: len(followed.tokens) >= 20)
    pair.armed.write_text(failpoint)
    with pytest.raises(Unavailable):
        await pair.migrate()
    assert await pair.warm.exited(pair.source.record.pid) == -9
    await gateway.lost(pair.source.target)
    gateway.resume(pair.destination.target, followed)
    await gateway.finished(followed)
    assert followed.tokens == expected


@pytest.mark.parametrize("failpoint", AT_DESTINATION)
async def test_when_the_destination_dies_the_source_goes_on(
    pair: Pair, gateway: Gateway, request_of: Make, failpoint: str
) -> None:
    request = request_of(1, PROMPT, max_tokens=TOKENS)
    expected = await undisturbed(gateway, pair.source, request)
    followed = gateway.send(pair.source.target, replace(request, cache_salt="cold"))
    await gateway.until(lambda: len(followed.tokens) >= 20)
    pair.armed.write_text(failpoint)
    reports = await pair.migrate()
    assert (reports[-1].state, reports[-1].error_reason) == (MigrationState.FAILED, "UNAVAILABLE")
    assert await pair.warm.exited(pair.destination.record.pid) == -9
    await gateway.finished(followed)
    assert followed.moves == []
    assert followed.tokens == expected
