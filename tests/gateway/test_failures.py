"""What goes wrong on the way of tokens for good: an error that the client sees, never a short answer."""

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from sllm.core.tokens import Finish, FinishReason, TokenOutput
from sllm.errors import EngineFailed, InvalidArgument, Unavailable

COMPLETIONS = "/v1/completions"
ASKED = {"model": "m", "prompt": "x"}
STREAMED = {**ASKED, "stream": True}
FAILING = TokenOutput(
    stream_id=0,
    position=0,
    token_ids=[],
    finish=Finish(reason=FinishReason.ERROR, error=EngineFailed("CUDA error: an illegal memory access")),
)


def after(count: int, change: Callable[[TokenOutput], TokenOutput]) -> Callable[[TokenOutput], TokenOutput]:
    """Let `count` outputs pass, then change every one."""
    counter = itertools.count()
    return lambda output: output if next(counter) < count else change(output)


def fail(output: TokenOutput) -> TokenOutput:
    return replace(output, token_ids=[], finish=FAILING.finish)


def give_up(output: TokenOutput) -> TokenOutput:
    return replace(output, token_ids=[], finish=Finish(reason=FinishReason.ABORT))


def skip_one(output: TokenOutput) -> TokenOutput:
    return replace(output, position=output.position + 1)


def break_stream(output: TokenOutput) -> TokenOutput:
    raise Unavailable("the host is going down")


async def publish_failing(
    cluster: Any, a_route: Any, change: Callable[[TokenOutput], TokenOutput], *, after_outputs: int
) -> None:
    """Serve by a replica that fails after some outputs, and by two that then fail at once: nobody can go on."""
    _, first = await cluster.host("rep-1", script=after(after_outputs, change))
    _, second = await cluster.host("rep-2", script=change)
    _, third = await cluster.host("rep-3", script=change)
    await cluster.publish(a_route("m", first, second, third))


async def until_idle(cluster: Any) -> None:
    for host in cluster.hosts.values():
        await host.until_running(0)
    assert not cluster.gateway.dispatcher._load


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engines_own_reason_is_the_answer(cluster: Any, a_route: Any, stream: bool) -> None:
    await publish_failing(cluster, a_route, fail, after_outputs=0)
    answer = await cluster.http.post(COMPLETIONS, json={**ASKED, "stream": stream})
    assert answer.status_code == 503
    assert answer.json()["error"] == {
        "message": "CUDA error: an illegal memory access; so ended 2 replicas in a row with this request",
        "type": "service_unavailable_error",
        "param": None,
        "code": "engine_failed",
    }


async def test_what_the_engine_cannot_accept_is_the_callers_fault(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host()
    host.refuse_with = InvalidArgument("the grammar cannot be compiled")
    await cluster.publish(a_route("m", target))
    answer = await cluster.http.post(COMPLETIONS, json=ASKED)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the grammar cannot be compiled")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fail, "CUDA error"),
        (give_up, "gave up the request: abort"),
        (skip_one, "has a gap: token 3 was due, 4 came"),
        (break_stream, "rep-3 on node-1 was lost: the host is going down"),
    ],
)
class TestMidStream:
    async def test_the_error_is_in_the_stream_and_the_body_is_cut(
        self, cluster: Any, a_route: Any, change: Any, reason: str
    ) -> None:
        await publish_failing(cluster, a_route, change, after_outputs=3)
        async with cluster.raw_post(COMPLETIONS, STREAMED) as answer:
            whole = await answer.read()
        head, _, body = whole.partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head.lower()
        assert body.count(b'"text"') == 3
        assert b'data: {"error"' in body
        assert reason.encode() in body
        assert b"[DONE]" not in body
        assert not body.endswith(b"0\r\n\r\n"), "a body that ends properly is taken for a whole answer"
        await until_idle(cluster)

    async def test_an_http_client_that_reads_no_events_notices_too(
        self, cluster: Any, a_route: Any, change: Any, reason: str
    ) -> None:
        await publish_failing(cluster, a_route, change, after_outputs=3)
        with pytest.raises(httpx.RemoteProtocolError):
            await cluster.http.post(COMPLETIONS, json=STREAMED)

    async def test_openais_client_raises_it(self, cluster: Any, a_route: Any, change: Any, reason: str) -> None:
        await publish_failing(cluster, a_route, change, after_outputs=3)
        async with openai.AsyncOpenAI(base_url=f"{cluster.http.base_url}/v1", api_key="any", max_retries=0) as client:
            stream = await client.completions.create(model="m", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match=reason):
                async for _ in stream:
                    pass

    async def test_a_whole_answer_becomes_an_error(self, cluster: Any, a_route: Any, change: Any, reason: str) -> None:
        await publish_failing(cluster, a_route, change, after_outputs=3)
        answer = await cluster.http.post(COMPLETIONS, json=ASKED)
        assert answer.status_code == 503
        assert reason in answer.json()["error"]["message"]

    async def test_all_choices_fail_with_one(self, cluster: Any, a_route: Any, change: Any, reason: str) -> None:
        await publish_failing(cluster, a_route, change, after_outputs=7)
        answer = await cluster.http.post(COMPLETIONS, json={**ASKED, "n": 3})
        assert answer.status_code == 503
        await until_idle(cluster)


async def test_repeated_tokens_are_dropped(cluster: Any, a_route: Any) -> None:
    def repeat(output: TokenOutput) -> TokenOutput:
        if output.position == 0:
            return output
        return replace(output, position=output.position - 1, token_ids=[ord("?"), *output.token_ids])

    _, target = await cluster.host(script=repeat)
    await cluster.publish(a_route("m", target))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["text"] == "Hello there."


async def test_a_request_turned_away_goes_to_another_replica(cluster: Any, a_route: Any) -> None:
    draining, first = await cluster.host("rep-1", refuse_with=Unavailable("draining"))
    _, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first, second))
    for stream in (False, True):
        answer = await cluster.http.post(COMPLETIONS, json={**ASKED, "stream": stream, "n": 2})
        assert answer.status_code == 200
    assert len(draining.requests) >= 2
    assert not cluster.gateway.dispatcher._load


async def test_a_replica_lost_before_the_first_token_costs_no_request(cluster: Any, a_route: Any) -> None:
    lost, first = await cluster.host("rep-1")
    lost.go.clear()
    _, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first, second))
    asking = asyncio.create_task(cluster.http.post(COMPLETIONS, json={**ASKED, "n": 2}))
    await lost.until_running(2)
    await cluster.servers["rep-1"][0].stop(None)
    assert (await asking).json()["text"].count("H") == 2


async def test_a_replica_that_is_gone_already_is_found_out(cluster: Any, a_route: Any) -> None:
    _, first = await cluster.host("rep-1")
    await cluster.servers["rep-1"][0].stop(None)
    _, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first, second))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["text"] == "Hello there."


async def test_a_replica_of_another_generation_is_not_used(cluster: Any, a_route: Any) -> None:
    _, first = await cluster.host("rep-1", generation=2)
    _, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first, second))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["text"] == "Hello there."


async def test_a_request_that_every_replica_turns_away_fails_in_the_end(cluster: Any, a_route: Any) -> None:
    targets = [(await cluster.host(f"rep-{i}", refuse_with=Unavailable("draining")))[1] for i in range(4)]
    await cluster.publish(a_route("m", *targets))
    answer = await cluster.http.post(COMPLETIONS, json=ASKED)
    assert answer.status_code == 503
    assert "draining" in answer.json()["error"]["message"]


async def test_two_first_requests_at_once_open_one_connection(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host()
    await cluster.publish(a_route("a", target), a_route("b", target))
    asked = [cluster.http.post(COMPLETIONS, json={**ASKED, "model": name}) for name in "aabb"]
    answers = await asyncio.gather(*asked)
    assert [a.json()["text"] for a in answers] == ["Hello there."] * 4
    assert host.streams == 1


async def test_after_a_break_the_next_request_opens_a_new_connection(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host("rep-1", script=break_stream)
    _, other = await cluster.host("rep-2")
    await cluster.publish(a_route("m", target, other))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["text"] == "Hello there."
    host.script = lambda output: output
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["text"] == "Hello there."
    assert host.streams == 2


async def test_a_connection_that_is_not_needed_any_more_is_closed(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    await cluster.publish(a_route("m", target))
    await cluster.http.post(COMPLETIONS, json=ASKED)
    assert list(cluster.gateway._connections._open) == ["rep-1"]
    await cluster.publish(a_route("m"))
    assert cluster.gateway._connections._open == {}


async def test_a_good_stream_ends_properly(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    await cluster.publish(a_route("m", target))
    async with cluster.raw_post(COMPLETIONS, STREAMED) as answer:
        whole = await answer.readuntil(b"0\r\n\r\n")
    events = [line for line in whole.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(json.loads(e[6:])["text"] for e in events) == "Hello there."
    assert b"data: [DONE]" in whole
