"""The real thing: requests that move between two engine hosts with vLLM, to and fro, and answer as if they had not."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from engine.following import Followed, Gateway, target_of

from sllm.core.ids import MigrationId, ReplicaId, RequestId
from sllm.core.launch import Launch
from sllm.core.migration import MigrationOrder, MigrationReport, MigrationState, RecomputeCost
from sllm.core.replica import ReplicaState
from sllm.core.route import RouteTarget
from sllm.core.tokens import TokenRequest
from sllm.rpc.engine import AttachRequest, EngineClient

pytestmark = [pytest.mark.vllm, pytest.mark.e2e]

Make = Callable[..., Any]
PROMPT = [5, 17, 30, 44, 90, 100, 101, 102] * 3
TOKENS = 950


@dataclass
class Running:
    """An engine host that is up."""

    client: EngineClient
    launch: Launch
    pid: int

    @property
    def target(self) -> RouteTarget:
        return target_of(self.launch.spec, self.client.address)


@pytest.fixture
async def hosts(
    start_warm: Make, make_launch: Make, tiny_weights: Path, settled: Make
) -> AsyncIterator[tuple[Running, Running]]:
    """Two hosts, forked from one warm process."""
    warm, running = start_warm("vllm"), []
    for name in ("a", "b"):
        launch = make_launch(
            id=ReplicaId(f"rep-{name}"),
            max_model_len=1024,
            engine_args={"dtype": "float32"},
            execution_dir=str(tiny_weights),
            weights=tiny_weights,
        )
        record = await warm.fork(launch)
        client = EngineClient(record.address, None, peer="engine host")
        running.append(Running(client, launch, record.pid))
        status = await settled(client, launch.nonce)
        assert status.state is ReplicaState.READY, status.error
    yield running[0], running[1]
    for host in running:
        await host.client.close()
        os.kill(host.pid, signal.SIGTERM)
        assert await warm.exited(host.pid) == 0


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    follower = Gateway()
    yield follower
    await follower.close()


def ask(params: Any, request: str = "req-1") -> TokenRequest:
    return TokenRequest(
        stream_id=0, request_id=RequestId(request), token_ids=PROMPT, sampling_params=msgspec.json.encode(params)
    )


async def undisturbed(gateway: Gateway, host: Running, request: TokenRequest) -> list[int]:
    followed = gateway.send(host.target, replace(request, request_id=RequestId("req-undisturbed")))
    await gateway.finished(followed)
    return followed.tokens


async def moved(
    gateway: Gateway, source: Running, destination: Running, *followed: Followed, **changes: Any
) -> list[MigrationReport]:
    """Migrate all that runs, and return the reports once something has come from where it went."""
    order = MigrationOrder(
        id=MigrationId("mig-1"),
        replica=source.launch.spec.id,
        generation=source.launch.spec.generation,
        target=destination.target,
        **changes,
    )
    async with aclosing(source.client.migrate(order)) as reports:
        seen = [report async for report in reports]
    assert seen[-1].state is MigrationState.MOVED, seen[-1]
    await gateway.until(lambda: all(each.moves and len(each.tokens) > each.moves[-1][0] for each in followed))
    return seen


async def test_a_greedy_answer_that_moves_to_and_fro_is_the_same(
    vllm: SimpleNamespace, hosts: tuple[Running, Running], gateway: Gateway
) -> None:
    request = ask(vllm.sampling.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True))
    expected = await undisturbed(gateway, hosts[0], request)
    followed = gateway.send(hosts[0].target, replace(request, cache_salt="cold"))
    for move in range(4):
        here, there = hosts[move % 2], hosts[(move + 1) % 2]
        await gateway.until(lambda: len(followed.tokens) >= 130 + 60 * move)  # noqa: B023 - awaited at once
        reports = await moved(gateway, here, there, followed)
        rounds = [report.last_round for report in reports if report.last_round]
        assert rounds[0].tokens >= len(PROMPT) + 130 + 60 * move
        assert (rounds[0].cached_tokens == 0) == (move == 0), "later, the destination remembers"
    await gateway.finished(followed)
    assert [node for _, node in followed.moves] == ["b", "a", "b", "a"]
    assert followed.tokens == expected


@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "seeded"])
async def test_one_that_moves_during_its_prefill_is_the_same(
    vllm: SimpleNamespace, hosts: tuple[Running, Running], gateway: Gateway, seed: int | None
) -> None:
    """Rounds that gain nothing are not run: it is handed over at once, while its engine computes the prompt."""
    params = {"temperature": 0.0 if seed is None else 1.0, "seed": seed, "max_tokens": 60, "ignore_eos": True}
    request = replace(ask(vllm.sampling.SamplingParams(**params)), token_ids=PROMPT * 38)
    expected = await undisturbed(gateway, hosts[1], request)
    followed = gateway.send(hosts[0].target, replace(request, cache_salt="cold"))
    await running(hosts[0])
    no_gain = RecomputeCost(per_token_s=1e-9, fixed_s=1.0, observations=9)
    await moved(gateway, *hosts, followed, cost=no_gain)
    await gateway.finished(followed)
    assert followed.moves == [(0, "b")]
    assert followed.tokens == expected


async def running(host: Running) -> None:
    """Wait until a request has come to a host."""
    async with aclosing(host.client.attach(AttachRequest(nonce=host.launch.nonce))) as statuses:
        async for status in statuses:
            if status.running:
                return


async def test_seeded_choices_that_move_together_are_the_same(
    vllm: SimpleNamespace, hosts: tuple[Running, Running], gateway: Gateway
) -> None:
    make = vllm.sampling.SamplingParams
    requests = [
        ask(make(temperature=1.0, top_p=0.9, seed=seed, presence_penalty=0.5, max_tokens=TOKENS, ignore_eos=True))
        for seed in (1, 2, 3)
    ]
    expected = [await undisturbed(gateway, hosts[0], request) for request in requests]
    followed = [gateway.send(hosts[0].target, request) for request in requests]
    await gateway.until(lambda: all(len(each.tokens) >= 100 for each in followed))
    reports = await moved(gateway, *hosts, *followed)
    await gateway.finished(*followed)
    assert reports[-1].output_tokens == sum(each.moves[0][0] for each in followed)
    assert [each.tokens for each in followed] == expected
