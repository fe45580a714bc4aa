"""Requests that find no room: held, told about it, brought to a replica in order, or refused."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sllm.core.request import RequestState
from sllm.errors import DeadlineExceeded, EngineFailed, NotFound, QueueFull, SllmError, Unavailable
from sllm.rpc.routes import AcquireRequest, AcquireUpdate

COMPLETIONS = "/v1/completions"
ASKED = {"model": "m", "prompt": "x"}
STREAMED = {**ASKED, "stream": True}


def answering(*updates: AcquireUpdate, error: SllmError | None = None, go: asyncio.Event | None = None) -> Any:
    async def acquire(request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        for update in updates:
            if go is not None and update.target is not None:
                await go.wait()
            yield update
        if error is not None:
            if go is not None:
                await go.wait()
            raise error

    return acquire


async def text_of(answer: Any) -> str:
    return "".join(json.loads(line[6:])["text"] async for line in answer.aiter_lines() if line.startswith("data: {"))


async def test_with_room_the_controller_is_not_asked(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    await cluster.publish(a_route("m", target))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["text"] == "Hello there."
    assert cluster.controller.acquires == []


async def test_a_request_for_a_sleeping_deployment_is_held_until_a_replica_is_ready(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    cluster.controller.on_acquire = answering(AcquireUpdate(phase="loading"), AcquireUpdate(target=target))
    await cluster.publish(a_route("m"))
    answer = await cluster.http.post(COMPLETIONS, json=ASKED)
    assert answer.json()["text"] == "Hello there."
    [asked] = cluster.controller.acquires
    assert asked.request_id == answer.headers["x-request-id"]
    assert 299 < asked.timeout_s <= 300


async def test_a_held_stream_gets_progress_comments_then_tokens(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    go = asyncio.Event()
    waiting = AcquireUpdate(phase="loading", progress=0.42)
    cluster.controller.on_acquire = answering(waiting, AcquireUpdate(target=target), go=go)
    await cluster.publish(a_route("m"))
    async with cluster.http.stream("POST", COMPLETIONS, json=STREAMED) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"].startswith("req-")
        lines = answer.aiter_lines()
        assert await anext(lines) == ": loading 42%"
        go.set()
        rest = [line async for line in lines]
    events = [json.loads(line[6:]) for line in rest if line.startswith("data: {")]
    assert "".join(event["text"] for event in events) == "Hello there."
    assert [line for line in rest if line][-1] == "data: [DONE]"


async def test_a_stream_whose_first_token_takes_long_gets_comments_too(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host()
    host.go.clear()
    await cluster.publish(a_route("m", target))
    async with cluster.http.stream("POST", COMPLETIONS, json=STREAMED) as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == ": running"
        host.go.set()
        assert [line async for line in lines if line][-1] == "data: [DONE]"


async def test_a_stream_that_is_served_soon_gets_no_comment(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    await cluster.publish(a_route("m", target))
    answer = await cluster.http.post(COMPLETIONS, json=STREAMED)
    assert not [line for line in answer.text.splitlines() if line.startswith(":")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (QueueFull("256 requests wait already", retry_after_s=7.0), 503, {"retry-after": "7"}),
        (EngineFailed("out of memory: 3 GiB wanted, 2 GiB there"), 503, {}),
        (NotFound("'m' was deleted"), 404, {}),
    ],
)
async def test_why_there_will_be_no_replica_is_the_answer(
    cluster: Any, a_route: Any, error: SllmError, status: int, headers: dict[str, str], stream: bool
) -> None:
    cluster.controller.on_acquire = answering(error=error)
    await cluster.publish(a_route("m"))
    answer = await cluster.http.post(COMPLETIONS, json={**ASKED, "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == error.message
    assert headers.items() <= dict(answer.headers).items()


async def test_after_the_first_comment_a_failure_is_in_the_stream_and_the_body_is_cut(
    cluster: Any, a_route: Any
) -> None:
    go = asyncio.Event()
    error = EngineFailed("out of memory")
    cluster.controller.on_acquire = answering(AcquireUpdate(phase="building"), error=error, go=go)
    await cluster.publish(a_route("m"))
    async with cluster.raw_post(COMPLETIONS, STREAMED) as answer:
        head = await answer.readuntil(b": building\n\n")
        go.set()
        body = await answer.read()
    assert head.startswith(b"HTTP/1.1 200")
    assert b'data: {"error": {"message": "out of memory"' in body
    assert b"[DONE]" not in body
    assert not body.endswith(b"0\r\n\r\n")


async def test_a_held_request_has_a_deadline_while_the_controller_is_away_too(cluster: Any, a_route: Any) -> None:
    cluster.gateway._app._config = cluster.gateway._config.model_copy(update={"queue_timeout_s": 0.1})
    cluster.controller.on_acquire = answering(error=Unavailable("shutting down"))
    await cluster.publish(a_route("m"))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).status_code == 503


async def test_a_controller_that_keeps_the_deadline_answers_504(cluster: Any, a_route: Any) -> None:
    cluster.controller.on_acquire = answering(error=DeadlineExceeded("'m': no replica within 300 s"))
    await cluster.publish(a_route("m"))
    answer = await cluster.http.post(COMPLETIONS, json=ASKED)
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")
    assert answer.headers["x-should-retry"] == "false"


async def test_while_the_controller_is_away_a_request_goes_on_waiting(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    tries = iter([Unavailable("restarting"), None])

    async def acquire(request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        error = next(tries)
        if error is not None:
            raise error
        yield AcquireUpdate(target=target)

    cluster.controller.on_acquire = acquire
    await cluster.publish(a_route("m"))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["text"] == "Hello there."


async def test_a_client_that_leaves_while_held_ends_its_acquire_at_once(cluster: Any, a_route: Any) -> None:
    await cluster.publish(a_route("m"))
    for body in (ASKED, STREAMED):
        asking = asyncio.create_task(cluster.http.post(COMPLETIONS, json=body))
        await cluster.controller.until_waiting(1)
        asking.cancel()
        await cluster.controller.until_waiting(0)
        await asyncio.wait_for(cluster.gateway.dispatcher.requests.none_left(), 10)
    assert cluster.gateway.dispatcher._held == {}


async def test_room_goes_to_the_first_that_waits_without_asking(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host(capacity=1)
    host.go.clear()
    await cluster.publish(a_route("m", target))
    asking = []
    for i in range(3):
        asking.append(asyncio.create_task(cluster.http.post(COMPLETIONS, json={**ASKED, "prompt": str(i)})))
        await host.until_running(1)
        await cluster.controller.until_waiting(i)
    host.go.set()
    answers = await asyncio.gather(*asking)
    assert [a.json()["text"] for a in answers] == ["Hello there."] * 3
    assert [r.token_ids for r in host.requests] == [[ord(c) + 3] for c in "012"]
    assert len(cluster.controller.acquires) == 2
    assert host.streams == 1


async def test_a_replica_that_appears_in_the_table_takes_what_waits(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    await cluster.publish(a_route("m"))
    asking = asyncio.create_task(cluster.http.post(COMPLETIONS, json=ASKED))
    await cluster.controller.until_waiting(1)
    await cluster.publish(a_route("m", target))
    assert (await asking).json()["text"] == "Hello there."


async def test_a_deployment_deleted_while_requests_wait_answers_404(cluster: Any, a_route: Any) -> None:
    await cluster.publish(a_route("m"))
    asking = asyncio.create_task(cluster.http.post(COMPLETIONS, json=ASKED))
    await cluster.controller.until_waiting(1)
    await cluster.publish(a_route("m", deleting=True))
    assert (await asking).status_code == 404


async def test_n_choices_are_one_request_on_one_replica(cluster: Any, a_route: Any) -> None:
    one, first = await cluster.host("rep-1", capacity=1)
    two, second = await cluster.host("rep-2", capacity=1)
    one.go.clear()
    await cluster.publish(a_route("m", first, second))
    asking = asyncio.create_task(cluster.http.post(COMPLETIONS, json={**ASKED, "n": 3}))
    await one.until_running(3)
    [row] = cluster.gateway.dispatcher.requests.rows()
    assert (row.state, row.replica, row.prompt_tokens) == (RequestState.RUNNING, "rep-1", 1)
    one.go.set()
    assert len((await asking).json()["text"]) == 3 * len("Hello there.")
    assert (len(one.requests), len(two.requests)) == (3, 0)


async def test_rows_say_what_waits_and_what_runs_and_what_ended_is_counted(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host(capacity=1)
    host.go.clear()
    await cluster.publish(a_route("m", target))
    asking = [asyncio.create_task(cluster.http.post(COMPLETIONS, json=ASKED))]
    await host.until_running(1)
    asking.append(asyncio.create_task(cluster.http.post(COMPLETIONS, json=ASKED)))
    await cluster.controller.until_waiting(1)
    dispatcher = cluster.gateway.dispatcher
    assert [(r.state, r.replica) for r in dispatcher.requests.rows()] == [
        (RequestState.RUNNING, "rep-1"),
        (RequestState.HELD, None),
    ]
    dispatcher.requests.take_finished()
    host.go.set()
    await asyncio.gather(*asking)
    await asyncio.wait_for(dispatcher.requests.none_left(), 10)
    assert dispatcher.requests.rows() == ()
    assert dispatcher.requests.take_finished() == {"m": 2}
    assert dispatcher.requests.take_finished() == {}


async def test_a_client_that_leaves_while_its_request_runs_frees_it_at_once(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host()
    host.go.clear()
    await cluster.publish(a_route("m", target))
    for body in (ASKED, STREAMED, {**STREAMED, "n": 2}):
        asking = asyncio.create_task(cluster.http.post(COMPLETIONS, json=body))
        await host.until_running(body.get("n", 1))
        asking.cancel()
        await host.until_running(0)
        await asyncio.wait_for(cluster.gateway.dispatcher.requests.none_left(), 10)
        assert not cluster.gateway.dispatcher._load
