"""A replica is lost in the middle of an answer: it goes on on another one, and its client sees no difference."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gateway.asking import ASKED, CHOICES, COMPLETIONS, STREAMED, SUFFIXES, TEXT, events_of, texts_of
from gateway.plain_front_end import PlainBuilder
from gateway.running import Cluster, running_cluster

from sllm.core.tokens import Finish, FinishReason, TokenOutput
from sllm.errors import DeadlineExceeded, EngineFailed, InvalidArgument, QueueFull, SllmError, Unavailable
from sllm.rpc.routes import AcquireRequest, AcquireUpdate

CUDA_ERROR = Finish(reason=FinishReason.ERROR, error=EngineFailed("CUDA error"))

Script = Callable[[TokenOutput], TokenOutput]


def crash(output: TokenOutput) -> TokenOutput:
    raise Unavailable("the host is going down")


def fail(output: TokenOutput) -> TokenOutput:
    return replace(output, token_ids=[], finish=CUDA_ERROR)


def give_up(output: TokenOutput) -> TokenOutput:
    return replace(output, token_ids=[], finish=Finish(reason=FinishReason.ABORT))


def stop(output: TokenOutput) -> TokenOutput:
    finish = Finish(reason=FinishReason.ERROR, error=Unavailable("rep-1 is stopping"))
    return replace(output, token_ids=[], finish=finish)


def skip_one(output: TokenOutput) -> TokenOutput:
    return replace(output, position=output.position + 1)


def after(count: int, change: Script) -> Script:
    """Let `count` outputs pass, then change every one."""
    counter = itertools.count()
    return lambda output: output if next(counter) < count else change(output)


@pytest.mark.parametrize("change", [crash, fail, give_up, stop, skip_one])
@pytest.mark.parametrize("at", range(len(TEXT) + 1))
async def test_wherever_its_replica_is_lost_a_stream_goes_on(
    cluster: Any, a_route: Any, change: Script, at: int
) -> None:
    lost, first = await cluster.host("rep-1")
    other, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first, second))
    undisturbed = await events_of(cluster, STREAMED)
    lost.script = after(at, change)
    assert await events_of(cluster, STREAMED) == undisturbed
    [resumed] = other.requests
    assert (resumed.num_output_tokens, resumed.request_id) == (at, lost.requests[1].request_id)
    assert resumed.token_ids == lost.requests[1].token_ids + [ord(c) + 3 for c in TEXT[:at]]
    assert not cluster.gateway.dispatcher._load


@pytest.mark.parametrize("change", [crash, fail])
async def test_so_does_an_answer_that_is_not_streamed(cluster: Any, a_route: Any, change: Script) -> None:
    _, first = await cluster.host("rep-1", script=after(5, change))
    _, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first, second))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["text"] == TEXT


@pytest.mark.parametrize("change", [crash, fail, skip_one])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 20, 40, 41, 42])
async def test_choices_go_on_together_those_that_are_over_stay_over(
    cluster: Any, a_route: Any, change: Script, at: int
) -> None:
    """The first choice is over after at most 39 outputs of all three, the last only with the 45th."""
    _, first = await cluster.host("rep-1", script=after(at, change))
    other, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first, second))
    assert texts_of(await events_of(cluster, CHOICES)) == [TEXT + suffix for suffix in SUFFIXES]
    assert len(other.requests) == 3 if at <= 20 else len(other.requests) in (1, 2)
    assert not cluster.gateway.dispatcher._load


@pytest.mark.parametrize("change", [crash, fail, skip_one])
@pytest.mark.parametrize("more", [0, 1, 5])
async def test_a_destination_that_dies_after_the_handover_leaves_the_request_to_the_source_paper_5(
    cluster: Any, a_route: Any, change: Script, more: int
) -> None:
    source, first = await cluster.host("rep-1")
    destination, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first))
    undisturbed = await events_of(cluster, STREAMED)
    dying = after(more, change)

    def moved_once(output: TokenOutput) -> TokenOutput:
        source.moves = {}
        return dying(output)

    source.moves, destination.script = {3: second}, moved_once
    assert await events_of(cluster, STREAMED) == undisturbed
    assert source.requests[-1].num_output_tokens == 3 + more
    assert not cluster.gateway.dispatcher._load


async def test_a_process_that_dies_costs_nothing_to_any_of_its_requests(cluster: Any, a_route: Any) -> None:
    lost, first = await cluster.host("rep-1", script=lambda output: output)
    _, second = await cluster.host("rep-2", capacity=100)
    await cluster.publish(a_route("m", first))
    ten = asyncio.Event()

    def pause(output: TokenOutput) -> TokenOutput:
        if output.position == 6:
            lost.go.clear()
            ten.set()
        return output

    lost.script = pause
    asking = [asyncio.create_task(events_of(cluster, body)) for body in [STREAMED, CHOICES] * 4]
    await asyncio.wait_for(ten.wait(), 10)
    await cluster.publish(a_route("m", first, second))
    await cluster.servers["rep-1"][0].stop(None)
    for lines, suffixes in zip(await asyncio.gather(*asking), [[""], SUFFIXES] * 4, strict=True):
        assert [text for text in texts_of(lines) if text] == [TEXT + suffix for suffix in suffixes]
    assert not cluster.gateway.dispatcher._load


async def test_a_request_that_gets_on_may_lose_any_number_of_replicas(cluster: Any, a_route: Any) -> None:
    hosts = [await cluster.host(f"rep-{i}", script=after(1, crash)) for i in range(8)]
    _, last = await cluster.host("rep-9")
    await cluster.publish(a_route("m", *(target for _, target in hosts), last))
    assert texts_of(await events_of(cluster, STREAMED))[0] == TEXT
    assert [host.requests[0].num_output_tokens for host, _ in hosts] == list(range(8))


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("change", [crash, fail])
async def test_a_request_that_kills_engines_kills_two_that_have_not_got_it_on(
    cluster: Any, a_route: Any, change: Script, tokens: int
) -> None:
    hosts = [await cluster.host(f"rep-{i}", script=after(tokens * (i == 1), change)) for i in range(1, 5)]
    await cluster.publish(a_route("m", *(target for _, target in hosts)))
    answer = await cluster.http.post(COMPLETIONS, json=ASKED)
    assert answer.status_code == 503
    assert "so ended 2 replicas in a row" in answer.json()["error"]["message"]
    assert [len(host.requests) for host, _ in hosts] == ([1, 1, 1, 0] if tokens else [1, 1, 0, 0])


async def test_dead_replicas_that_are_still_in_the_table_are_passed_over(cluster: Any, a_route: Any) -> None:
    """A node with many replicas has died: none of them has died of this request."""
    targets = [(await cluster.host(f"rep-{i}", script=after(3, crash)))[1] for i in range(1, 7)]
    for i in range(2, 7):
        await cluster.servers[f"rep-{i}"][0].stop(None)
    _, last = await cluster.host("rep-7")
    await cluster.publish(a_route("m", *targets, last))
    assert texts_of(await events_of(cluster, STREAMED))[0] == TEXT


async def test_what_the_other_replica_cannot_take_is_an_error_in_the_stream(cluster: Any, a_route: Any) -> None:
    _, first = await cluster.host("rep-1", script=after(3, crash))
    _, second = await cluster.host("rep-2", refuse_with=InvalidArgument("it cannot be resumed"))
    third, unasked = await cluster.host("rep-3")
    await cluster.publish(a_route("m", first, second, unasked))
    async with cluster.raw_post(COMPLETIONS, STREAMED) as answer:
        whole = await answer.read()
    assert b'data: {"error": {"message": "it cannot be resumed"' in whole
    assert b"[DONE]" not in whole
    assert third.requests == []


# --- with nobody to go on at once ------------------------------------------------------------


def answering(*updates: AcquireUpdate, error: SllmError | None = None, go: asyncio.Event | None = None) -> Any:
    async def acquire(request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        for update in updates:
            yield update
            if go is not None:
                await go.wait()
        if error is not None:
            raise error

    return acquire


async def test_a_replica_is_started_for_it_and_the_stream_is_kept_alive(cluster: Any, a_route: Any) -> None:
    _, first = await cluster.host("rep-1", script=after(3, crash))
    _, second = await cluster.host("rep-2")
    go = asyncio.Event()
    starting = AcquireUpdate(phase="loading", progress=0.5)
    cluster.controller.on_acquire = answering(starting, AcquireUpdate(target=second), go=go)
    await cluster.publish(a_route("m", first))
    async with cluster.http.stream("POST", COMPLETIONS, json=STREAMED) as answer:
        lines = answer.aiter_lines()
        seen: list[str] = []
        async for line in lines:
            seen.append(line)
            if line == ": loading 50%":
                break
        go.set()
        seen += [line async for line in lines]
    assert texts_of(seen)[0] == TEXT
    assert sum(line.startswith("data: {") for line in seen[: seen.index(": loading 50%")]) == 3


async def test_an_answer_that_is_not_streamed_waits_too(cluster: Any, a_route: Any) -> None:
    _, first = await cluster.host("rep-1", script=after(3, crash))
    _, second = await cluster.host("rep-2")
    cluster.controller.on_acquire = answering(AcquireUpdate(target=second))
    await cluster.publish(a_route("m", first))
    answer = await cluster.http.post(COMPLETIONS, json=ASKED)
    assert answer.json()["text"] == TEXT
    [asked] = cluster.controller.acquires
    assert 299 < asked.timeout_s <= 300


async def test_its_own_replica_will_do_if_the_trouble_has_passed(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host("rep-1", script=after(3, crash))
    tries = itertools.count()

    async def acquire(request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        if next(tries) == 1:
            host.script = lambda output: output
        yield AcquireUpdate(target=target)

    cluster.controller.on_acquire = acquire
    await cluster.publish(a_route("m", target))
    assert texts_of(await events_of(cluster, STREAMED))[0] == TEXT
    assert (host.streams, len(cluster.controller.acquires)) == (2, 2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DeadlineExceeded("'m': no replica had room within 300 s"), "no replica had room"),
        (EngineFailed("rep-2 did not start: out of memory"), "out of memory"),
    ],
)
async def test_why_there_will_be_no_other_is_the_end_of_the_stream(
    cluster: Any, a_route: Any, error: SllmError, reason: str
) -> None:
    _, first = await cluster.host("rep-1", script=after(3, crash))
    cluster.controller.on_acquire = answering(error=error)
    await cluster.publish(a_route("m", first))
    async with cluster.raw_post(COMPLETIONS, STREAMED) as answer:
        whole = await answer.read()
    assert whole.count(b'"text"') == 3
    assert b'data: {"error"' in whole
    assert reason.encode() in whole
    assert b"[DONE]" not in whole
    assert not whole.endswith(b"0\r\n\r\n")


async def test_a_full_queue_is_no_end_for_half_an_answer(cluster: Any, a_route: Any) -> None:
    _, first = await cluster.host("rep-1", script=after(3, crash))
    _, second = await cluster.host("rep-2")
    tries = iter([QueueFull("256 requests wait already"), Unavailable("restarting"), None])

    async def acquire(request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        error = next(tries)
        if error is not None:
            raise error
        yield AcquireUpdate(target=second)

    cluster.controller.on_acquire = acquire
    await cluster.publish(a_route("m", first))
    assert texts_of(await events_of(cluster, STREAMED))[0] == TEXT


async def test_who_has_half_an_answer_goes_before_who_has_none(cluster: Any, a_route: Any) -> None:
    lost, first = await cluster.host("rep-1", capacity=1)
    other, second = await cluster.host("rep-2", capacity=1)
    lost.go.clear()
    other.go.clear()
    await cluster.publish(a_route("m", first, second))
    asking = []
    for waiting, (prompt, host) in enumerate([("a", lost), ("b", other), ("c", None)]):
        asking.append(asyncio.create_task(events_of(cluster, {**STREAMED, "prompt": prompt})))
        if host is None:
            await cluster.controller.until_waiting(waiting - 1)
        else:
            await host.until_running(1)
    await cluster.publish(a_route("m", second))
    lost.script = after(3, crash)
    lost.go.set()
    await cluster.controller.until_waiting(2)
    other.go.set()
    assert [texts_of(lines)[0] for lines in await asyncio.gather(*asking)] == [TEXT] * 3
    assert [request.token_ids[0] - 3 for request in other.requests] == [ord("b"), ord("a"), ord("c")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("told_by_controller", [False, True])
async def test_tokens_mean_nothing_to_another_revision(
    cluster: Any, a_route: Any, stream: bool, told_by_controller: bool
) -> None:
    lost, first = await cluster.host("rep-1", script=after(3, crash))
    other, second = await cluster.host("rep-2", revision=2)
    lost.go.clear()
    await cluster.publish(a_route("m", first))
    async with cluster.raw_post(COMPLETIONS, {**ASKED, "stream": stream}) as answer:
        await lost.until_running(1)
        if told_by_controller:
            cluster.controller.on_acquire = answering(AcquireUpdate(target=second))
        await cluster.publish(a_route("m", first, second, revision=2, digest="sha256-2"))
        lost.go.set()
        if not told_by_controller:
            await cluster.controller.until_waiting(1)
            await cluster.publish(a_route("m", second, revision=2, digest="sha256-2"))
        whole = await answer.readuntil(b"}}")
    assert b"'m' was replaced: no replica of revision 2 can go on with this answer" in whole
    assert other.requests == []


async def test_a_request_on_a_replica_whose_generation_is_over_goes_on(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host("rep-1")
    _, second = await cluster.host("rep-2")
    host.script = hanging(host, 2)
    cluster.controller.on_acquire = answering(AcquireUpdate(target=second))
    await cluster.publish(a_route("m", target))
    asking = asyncio.create_task(events_of(cluster, STREAMED))
    await host.until_running(1)
    host.generation = 2
    await cluster.publish(a_route("m", replace(target, generation=2)))
    another = asyncio.create_task(events_of(cluster, {**STREAMED, "max_tokens": 2}))
    assert texts_of(await asking)[0] == TEXT
    host.go.set()
    assert texts_of(await another)[0] == TEXT[:2]
    assert host.streams == 2


# --- replicas that hang ----------------------------------------------------------------------


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A cluster whose gateway soon takes a host for dead, and which gives up soon."""
    limits = {"silence_s": 0.4, "stall_s": 1.0, "recover_timeout_s": 0.5}
    async with running_cluster(tmp_path, PlainBuilder, **limits) as running:
        yield running


def hanging(host: Any, at: int) -> Script:
    """Make no further step after the one that makes output position `at`."""

    def script(output: TokenOutput) -> TokenOutput:
        if output.position == at:
            host.go.clear()
        return output

    return script


@pytest.mark.parametrize("beat_s", [None, 0.05])
async def test_a_host_without_a_sign_of_life_or_an_engine_without_a_step_is_left(
    impatient: Any, a_route: Any, beat_s: float | None
) -> None:
    hung, first = await impatient.host("rep-1", beat_s=beat_s)
    _, second = await impatient.host("rep-2", capacity=100)
    hung.script = hanging(hung, 4)
    await impatient.publish(a_route("m", first))
    asking = [asyncio.create_task(events_of(impatient, body)) for body in (STREAMED, CHOICES)]
    await hung.until_running(4)
    await impatient.publish(a_route("m", first, second))
    one, three = await asyncio.gather(*asking)
    assert texts_of(one)[0] == TEXT
    assert texts_of(three) == [TEXT + suffix for suffix in SUFFIXES]
    await hung.until_running(0)  # its stream was closed: it need not work for nobody


async def test_engines_that_hang_wherever_it_comes_are_its_end(impatient: Any, a_route: Any) -> None:
    hosts = [await impatient.host(f"rep-{i}", beat_s=0.05, steps=1) for i in range(1, 4)]
    for host, _ in hosts:
        host.go.clear()
    await impatient.publish(a_route("m", *(target for _, target in hosts)))
    answer = await impatient.http.post(COMPLETIONS, json=ASKED)
    assert answer.status_code == 503
    assert "rep-2 on node-1 was lost: its engine made no step for 1 s" in answer.json()["error"]["message"]
    assert hosts[2][0].requests == []


async def test_a_recovery_has_its_own_deadline(impatient: Any, a_route: Any) -> None:
    _, first = await impatient.host("rep-1", script=after(3, crash))
    await impatient.publish(a_route("m", first))
    impatient.controller.on_acquire = answering(error=Unavailable("restarting"))
    async with impatient.raw_post(COMPLETIONS, STREAMED) as answer:
        whole = await answer.read()
    assert b'data: {"error": {"message": "restarting"' in whole
    assert impatient.controller.acquires[0].timeout_s <= 0.5


async def test_hosts_that_speak_are_waited_for(impatient: Any, a_route: Any) -> None:
    """A first step may take five times as long as others; this one takes 30 signs of life, 1.5 s."""
    slow, first = await impatient.host("rep-1", beat_s=0.05)
    other, second = await impatient.host("rep-2")
    await impatient.publish(a_route("m", first, second))
    slow.go.clear()
    asking = asyncio.create_task(events_of(impatient, STREAMED))
    await slow.until_beaten(30)
    slow.go.set()
    assert texts_of(await asking)[0] == TEXT
    assert other.requests == []
