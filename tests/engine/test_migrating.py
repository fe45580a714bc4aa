"""Requests that move between two engine hosts, over real gRPC, followed as a gateway does (paper §5)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from engine.following import Followed, Gateway

from sllm.core.ids import MigrationId, ReplicaId, RequestId
from sllm.core.migration import OVER, MigrationOrder, MigrationReport, MigrationState
from sllm.core.replica import ReplicaState
from sllm.core.tokens import FinishReason
from sllm.engine.fake import FakeSettings
from sllm.errors import EngineFailed, NotFound, StaleGeneration, Unavailable
from sllm.rpc.engine import StopRequest

Serve = Callable[..., Any]
Make = Callable[..., Any]

BUILD = 4  # turns of the clock that the fake engine's build takes
PROMPT = list(range(3, 43))


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    follower = Gateway()
    yield follower
    await follower.close()


@pytest.fixture
def two(serve: Serve) -> Callable[..., Any]:
    """Return a coroutine function that serves two hosts: `gated` names those whose clock stands still once built."""

    async def start(gated: str = "", **changes: Any) -> tuple[Any, Any]:
        hosts = []
        for name in ("a", "b"):
            host = await serve(gated=name in gated, id=ReplicaId(f"rep-{name}"), **changes)
            if name in gated:
                host.clock.let(BUILD)
            await host.until(ReplicaState.READY)
            hosts.append(host)
        return hosts[0], hosts[1]

    return start


def order_of(source: Any, destination: Any, **changes: Any) -> MigrationOrder:
    values = {
        "id": MigrationId("mig-1"),
        "replica": source.launch.spec.id,
        "generation": source.launch.spec.generation,
        "target": destination.target,
    }
    return MigrationOrder(**{**values, **changes})


async def migrate(source: Any, destination: Any, **changes: Any) -> list[MigrationReport]:
    """Carry out an order and return all reports."""
    async with aclosing(source.client.migrate(order_of(source, destination, **changes))) as reports:
        return [report async for report in reports]


async def moving(source: Any, destination: Any, **changes: Any) -> asyncio.Task[list[MigrationReport]]:
    """Begin to carry out an order, and return once a round is under way, or something is over."""
    begun = asyncio.Event()

    async def carry_out() -> list[MigrationReport]:
        seen = []
        async with aclosing(source.client.migrate(order_of(source, destination, **changes))) as reports:
            async for report in reports:
                seen.append(report)
                if report.state is not MigrationState.QUEUED:
                    begun.set()
        return seen

    task = asyncio.create_task(carry_out())
    async with asyncio.timeout(20):
        await begun.wait()
    return task


def last(reports: list[MigrationReport], request: str = "req-1") -> MigrationReport:
    """Return how it ended, after checking that each request ended once, and last."""
    mine = [report for report in reports if report.request == request]
    assert [report.state in OVER for report in mine] == [False] * (len(mine) - 1) + [True]
    return mine[-1]


async def undisturbed(gateway: Gateway, host: Any, request: Any) -> list[int]:
    followed = gateway.send(host.target, replace(request, request_id=RequestId("req-undisturbed")))
    await gateway.finished(followed)
    return followed.tokens


async def had(gateway: Gateway, host: Any, followed: Followed, tokens: int) -> None:
    """Let a gated host make tokens, one per step, until a sequence has so many."""
    if tokens > len(followed.tokens):
        host.clock.let(tokens - len(followed.tokens))
    await gateway.until(lambda: len(followed.tokens) == tokens)


# --- it goes on as if nothing had happened -------------------------------------------------


@pytest.mark.parametrize(
    "tokens", [0, 1, 30, 59], ids=["before its first token", "after it", "midway", "before its last"]
)
async def test_a_request_that_moves_goes_on_exactly(two: Make, gateway: Gateway, request_of: Make, tokens: int) -> None:
    source, destination = await two(gated="a")
    request = request_of(1, PROMPT, max_tokens=60)
    expected = await undisturbed(gateway, destination, request)
    followed = gateway.send(source.target, request)
    await source.until_status(lambda status: status.running == 1)
    await had(gateway, source, followed, tokens)
    report = last(await migrate(source, destination))
    source.clock.open()
    await gateway.finished(followed)
    assert report.state is MigrationState.MOVED
    assert (report.prompt_tokens, report.output_tokens) == (len(PROMPT), tokens)
    assert followed.moves == [(tokens, "b")]
    assert followed.tokens == expected
    assert followed.finish is not None
    assert followed.finish.reason is FinishReason.LENGTH


async def test_a_request_moves_again_and_back(two: Make, gateway: Gateway, request_of: Make) -> None:
    hosts = await two(gated="ab")
    request = request_of(1, PROMPT, max_tokens=40)
    followed = gateway.send(hosts[0].target, request)
    await hosts[0].until_status(lambda status: status.running == 1)
    for move in range(4):
        here, there = hosts[move % 2], hosts[(move + 1) % 2]
        await had(gateway, here, followed, 9 * (move + 1))
        reports = asyncio.create_task(migrate(here, there))
        while not reports.done():
            there.clock.let(1)
            await asyncio.wait([reports], timeout=0.05)
        assert last(reports.result()).state is MigrationState.MOVED
        here.clock.let(1)  # ends the step that was under way
    for host in hosts:
        host.clock.open()
    await gateway.finished(followed)
    assert [node for _, node in followed.moves] == ["b", "a", "b", "a"]
    assert followed.tokens == await undisturbed(gateway, hosts[0], request)


async def test_all_choices_of_a_request_move_together(two: Make, gateway: Gateway, request_of: Make) -> None:
    source, destination = await two(gated="a")
    requests = [replace(request_of(1, PROMPT, max_tokens=40, seed=seed), stream_id=seed) for seed in (1, 2, 3)]
    expected = [await undisturbed(gateway, destination, request) for request in requests]
    followed = [gateway.send(source.target, request) for request in requests]
    await source.until_status(lambda status: status.running == 3)
    source.clock.let(9)
    await gateway.until(lambda: all(len(each.tokens) >= 5 for each in followed))
    report = last(await migrate(source, destination))
    source.clock.open()
    await gateway.finished(*followed)
    assert report.output_tokens == sum(position for each in followed for position, _ in each.moves)
    assert [len(each.moves) for each in followed] == [1, 1, 1]
    assert [each.tokens for each in followed] == expected


async def test_it_decodes_on_while_the_destination_recomputes(two: Make, gateway: Gateway, request_of: Make) -> None:
    source, destination = await two(gated="ab")
    request = request_of(1, PROMPT, max_tokens=200)
    followed = gateway.send(source.target, request)
    await source.until_status(lambda status: status.running == 1)
    await had(gateway, source, followed, 20)
    order = await moving(source, destination)
    await had(gateway, source, followed, 60)
    assert not order.done(), "the destination's clock stands still"
    destination.clock.open()
    report = last(await order)
    source.clock.open()
    await gateway.finished(followed)
    assert report.state is MigrationState.MOVED
    assert report.rounds >= 1
    assert report.last_round is None, "that is for the report of the round"
    assert followed.cached_tokens == [0], "what a resumed request had cached is no business of its client"
    assert followed.tokens == await undisturbed(gateway, source, request)


async def test_many_requests_move_and_the_rest_stay(two: Make, gateway: Gateway, request_of: Make) -> None:
    source, destination = await two(gated="a", capacity=8)
    requests = [replace(request_of(n, [n, *PROMPT], max_tokens=50), request_id=RequestId(f"req-{n}")) for n in range(6)]
    expected = [await undisturbed(gateway, destination, request) for request in requests]
    followed = [gateway.send(source.target, request) for request in requests]
    await source.until_status(lambda status: status.running == 6)
    source.clock.let(8)
    await gateway.until(lambda: all(len(each.tokens) >= 3 for each in followed))
    chosen = [RequestId(f"req-{n}") for n in (0, 2, 4, 5)]
    reports = await migrate(source, destination, requests=tuple(chosen), concurrency=2)
    source.clock.open()
    await gateway.finished(*followed)
    assert {last(reports, request).state for request in chosen} == {MigrationState.MOVED}
    assert [len(each.moves) for each in followed] == [1, 0, 1, 0, 1, 1]
    assert [each.tokens for each in followed] == expected


async def test_one_whose_turn_comes_with_the_end_of_another_moves_behind_its_own_tokens(
    two: Make, gateway: Gateway, request_of: Make
) -> None:
    """Both have a token of the step in which the first one ends, and the second is short enough to go at once."""
    source, destination = await two(gated="ab")
    waits = replace(request_of(1, [5], max_tokens=14), request_id=RequestId("req-waits"))
    ends = request_of(2, PROMPT, max_tokens=12)
    followed = [gateway.send(source.target, request) for request in (waits, ends)]
    await source.until_status(lambda status: status.running == 2)
    source.clock.let(8)
    await gateway.until(lambda: len(followed[1].tokens) >= 7)
    order = await moving(source, destination, requests=(ends.request_id, waits.request_id), concurrency=1)
    source.clock.let(5)
    reports = await order
    assert last(reports, ends.request_id).state is MigrationState.FINISHED
    assert last(reports, waits.request_id).state is MigrationState.MOVED
    destination.clock.open()
    source.clock.open()
    await gateway.finished(*followed)
    assert followed[0].moves
    assert followed[0].tokens == await undisturbed(gateway, destination, waits)


async def test_what_has_moved_away_ends_a_drain(two: Make, gateway: Gateway, request_of: Make) -> None:
    source, destination = await two(gated="a")
    followed = gateway.send(source.target, request_of(1, PROMPT, max_tokens=40))
    await source.until_status(lambda status: status.running == 1)
    await had(gateway, source, followed, 3)
    await source.client.stop(StopRequest(drain_s=60))
    assert last(await migrate(source, destination)).state is MigrationState.MOVED
    await source.host.finished.wait()
    await gateway.until(lambda: followed.finish is not None)
    assert followed.moves == [(3, "b")]


# --- it stays ------------------------------------------------------------------------------


async def test_a_request_that_ends_first_ends_as_usual(two: Make, gateway: Gateway, request_of: Make) -> None:
    """Paper §5: the inference may end during migration."""
    source, destination = await two(gated="ab")
    followed = gateway.send(source.target, request_of(1, PROMPT, max_tokens=40))
    await source.until_status(lambda status: status.running == 1)
    await had(gateway, source, followed, 20)
    order = await moving(source, destination)
    await had(gateway, source, followed, 40)
    report = last(await order)
    assert report.state is MigrationState.FINISHED
    assert followed.moves == []
    assert followed.finish is not None
    assert followed.finish.reason is FinishReason.LENGTH


async def test_a_request_that_is_not_there_has_finished(two: Make) -> None:
    source, destination = await two()
    reports = await migrate(source, destination, requests=(RequestId("req-1"),))
    assert last(reports).state is MigrationState.FINISHED


async def stays(two: Make, gateway: Gateway, request_of: Make, spoil: Callable[[Any, Any], Any]) -> MigrationReport:
    """Migrate to a destination that stands still or is spoiled, and check that the request runs to its end where it
    was."""
    source, destination = await two(gated="ab")
    request = request_of(1, PROMPT, max_tokens=40)
    followed = gateway.send(source.target, request)
    await source.until_status(lambda status: status.running == 1)
    await had(gateway, source, followed, 20)
    changes = await spoil(destination, gateway) or {}
    report = last(await migrate(source, destination, **changes))
    source.clock.open()
    await gateway.finished(followed)
    assert followed.moves == []
    assert followed.tokens == await undisturbed(gateway, source, request)
    return report


async def test_a_destination_that_is_dead_changes_nothing(two: Make, gateway: Gateway, request_of: Make) -> None:
    async def spoil(destination: Any, _: Gateway) -> dict[str, Any]:
        return {"target": replace(destination.target, address="127.0.0.1:1")}

    report = await stays(two, gateway, request_of, spoil)
    assert (report.state, report.error_reason) == (MigrationState.FAILED, "UNAVAILABLE")


async def test_a_destination_that_was_replaced_changes_nothing(two: Make, gateway: Gateway, request_of: Make) -> None:
    async def spoil(destination: Any, _: Gateway) -> dict[str, Any]:
        return {"target": replace(destination.target, generation=6)}

    report = await stays(two, gateway, request_of, spoil)
    assert (report.state, report.error_reason) == (MigrationState.FAILED, "STALE_GENERATION")


async def test_a_destination_that_is_leaving_changes_nothing(two: Make, gateway: Gateway, request_of: Make) -> None:
    async def spoil(destination: Any, follower: Gateway) -> None:
        follower.send(destination.target, replace(request_of(2, [5], max_tokens=9), request_id=RequestId("req-2")))
        await destination.until_status(lambda status: status.running == 1)
        await destination.client.stop(StopRequest(drain_s=60))

    report = await stays(two, gateway, request_of, spoil)
    assert (report.state, report.error_reason) == (MigrationState.FAILED, "UNAVAILABLE")


async def test_what_has_no_time_left_stays(two: Make, gateway: Gateway, request_of: Make) -> None:
    async def spoil(destination: Any, _: Gateway) -> dict[str, Any]:
        return {"within_s": 0.2}

    report = await stays(two, gateway, request_of, spoil)
    assert report.state is MigrationState.CANCELLED


async def test_a_call_that_ends_leaves_what_has_not_moved(two: Make, gateway: Gateway, request_of: Make) -> None:
    source, destination = await two(gated="ab", capacity=1)
    request = request_of(1, PROMPT, max_tokens=40)
    followed = gateway.send(source.target, request)
    await source.until_status(lambda status: status.running == 1)
    await had(gateway, source, followed, 20)
    async with aclosing(source.client.migrate(order_of(source, destination))) as reports:
        async for report in reports:
            if report.state is MigrationState.ROUNDS:
                break
    source.clock.open()
    await gateway.finished(followed)
    destination.clock.open()
    assert followed.moves == []
    assert followed.tokens == await undisturbed(gateway, destination, request)


async def test_a_source_that_stops_ends_the_order_and_its_requests(
    two: Make, gateway: Gateway, request_of: Make
) -> None:
    source, destination = await two(gated="ab")
    followed = gateway.send(source.target, request_of(1, PROMPT, max_tokens=40))
    await source.until_status(lambda status: status.running == 1)
    await had(gateway, source, followed, 20)
    order = await moving(source, destination)
    await gateway.until(lambda: len(followed.tokens) == 20)
    await source.client.stop(StopRequest())
    report = last(await order)
    assert report.state in (MigrationState.FINISHED, MigrationState.CANCELLED, MigrationState.FAILED)
    await gateway.finished(followed)
    assert followed.finish is not None
    assert isinstance(followed.finish.error, Unavailable)


async def test_a_source_whose_engine_breaks_ends_the_order(two: Make, gateway: Gateway, request_of: Make) -> None:
    source, destination = await two(gated="ab", fake=FakeSettings(crash_at=25))
    followed = gateway.send(source.target, request_of(1, PROMPT, max_tokens=40))
    await source.until_status(lambda status: status.running == 1)
    await had(gateway, source, followed, 20)
    order = await moving(source, destination)
    source.clock.open()
    report = last(await order)
    assert report.state is not MigrationState.MOVED
    await gateway.finished(followed)
    assert followed.finish is not None
    assert isinstance(followed.finish.error, EngineFailed)
    with pytest.raises(EngineFailed, match="position 25"):
        await migrate(source, destination)


async def test_orders_for_somebody_else_are_refused(two: Make) -> None:
    source, destination = await two()
    with pytest.raises(StaleGeneration):
        await migrate(source, destination, generation=6)
    with pytest.raises(NotFound, match="rep-other"):
        await migrate(source, destination, replica=ReplicaId("rep-other"))
