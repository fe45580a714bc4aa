"""Planned moves: a host hands a request over, and the client's open stream goes on as if nothing had happened."""

import asyncio
from typing import Any

import pytest
from gateway.asking import ASKED, CHOICES, COMPLETIONS, STREAMED, SUFFIXES, TEXT, events_of, texts_of

from sllm.core.request import RequestState
from sllm.errors import Unavailable


async def until_gone(cluster: Any) -> None:
    await asyncio.wait_for(cluster.gateway.dispatcher.requests.none_left(), 10)
    for host in cluster.hosts.values():
        await host.until_running(0)
    assert not cluster.gateway.dispatcher._load


@pytest.mark.parametrize("at", range(len(TEXT) + 1))
async def test_wherever_a_stream_is_moved_its_client_sees_the_same(cluster: Any, a_route: Any, at: int) -> None:
    source, first = await cluster.host("rep-1")
    destination, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first))  # the destination may not be in the table yet
    undisturbed = await events_of(cluster, STREAMED)
    source.moves = {at: second}
    assert await events_of(cluster, STREAMED) == undisturbed
    [resumed] = destination.requests
    assert resumed.num_output_tokens == at
    assert resumed.token_ids == source.requests[1].token_ids + [ord(c) + 3 for c in TEXT[:at]]
    assert resumed.sampling_params == source.requests[1].sampling_params
    await until_gone(cluster)


async def test_an_answer_that_is_not_streamed_moves_as_well(cluster: Any, a_route: Any) -> None:
    source, first = await cluster.host("rep-1")
    _, second = await cluster.host("rep-2")
    source.moves = {5: second}
    await cluster.publish(a_route("m", first))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["text"] == TEXT


@pytest.mark.parametrize("at", [0, 1, 6, 13, 14, 15])
async def test_choices_move_together_those_that_are_over_stay_over(cluster: Any, a_route: Any, at: int) -> None:
    source, first = await cluster.host("rep-1")
    destination, second = await cluster.host("rep-2")
    source.moves = {at: second}
    await cluster.publish(a_route("m", first))
    assert texts_of(await events_of(cluster, CHOICES)) == [TEXT + suffix for suffix in SUFFIXES]
    over = sum(len(TEXT + suffix) < at for suffix in SUFFIXES)
    assert len(destination.requests) == 3 - over
    await until_gone(cluster)


@pytest.mark.parametrize("body", [STREAMED, CHOICES])
async def test_a_request_moves_any_number_of_times_also_back(cluster: Any, a_route: Any, body: dict[str, Any]) -> None:
    one, first = await cluster.host("rep-1")
    two, second = await cluster.host("rep-2")
    one.moves, two.moves = {2: second, 6: second, 10: second}, {4: first, 8: first}
    await cluster.publish(a_route("m", first))
    suffixes = body.get("suffixes", [""])
    assert [text for text in texts_of(await events_of(cluster, body)) if text] == [TEXT + each for each in suffixes]
    # Choices may be a step apart, and are then at one of these positions more often: the more moves.
    assert min(len(one.requests), len(two.requests)) >= 3 * len(suffixes)
    assert (one.streams, two.streams) == (1, 1)
    await until_gone(cluster)


async def test_its_row_says_where_it_is_and_how_often_it_moved(cluster: Any, a_route: Any) -> None:
    one, first = await cluster.host("rep-1")
    two, second = await cluster.host("rep-2")
    three, third = await cluster.host("rep-3")
    one.moves, two.moves = {2: second, 6: third}, {4: first}
    three.go.clear()
    await cluster.publish(a_route("m", first))
    asking = asyncio.create_task(events_of(cluster, STREAMED))
    await three.until_running(1)
    [row] = cluster.gateway.dispatcher.requests.rows()
    assert (row.state, row.replica, row.moves) == (RequestState.RUNNING, "rep-3", 3)
    assert (row.prompt_tokens, row.output_tokens, row.max_tokens) == (2, 6, 100)
    assert row.interval_s > 0
    assert cluster.gateway.dispatcher._load == {"rep-3": 1}
    three.go.set()
    assert texts_of(await asking)[0] == TEXT


async def test_others_on_the_replica_stay(cluster: Any, a_route: Any) -> None:
    source, first = await cluster.host("rep-1")
    destination, second = await cluster.host("rep-2")
    await cluster.publish(a_route("m", first))
    source.go.clear()
    asking = [asyncio.create_task(events_of(cluster, {**STREAMED, "prompt": "stays", "max_tokens": 9}))]
    await source.until_running(1)
    source.go.set()
    source.moves = {12: second}
    asking.append(asyncio.create_task(events_of(cluster, STREAMED)))
    stays, moves = await asyncio.gather(*asking)
    assert (texts_of(stays)[0], texts_of(moves)[0]) == (TEXT[:9], TEXT)
    assert [request.num_output_tokens for request in destination.requests] == [12]


async def test_the_room_it_leaves_goes_to_who_waits(cluster: Any, a_route: Any) -> None:
    source, first = await cluster.host("rep-1", capacity=1)
    destination, second = await cluster.host("rep-2", capacity=1)
    source.go.clear()
    destination.go.clear()
    source.moves = {3: second}
    await cluster.publish(a_route("m", first))
    moves = asyncio.create_task(events_of(cluster, STREAMED))
    await source.until_running(1)
    waits = asyncio.create_task(events_of(cluster, {**STREAMED, "max_tokens": 2}))
    await cluster.controller.until_waiting(1)
    source.go.set()
    assert texts_of(await waits)[0] == TEXT[:2]
    assert cluster.gateway.dispatcher._load == {"rep-2": 1}
    destination.go.set()
    assert texts_of(await moves)[0] == TEXT


async def test_what_the_source_still_says_is_not_heard(cluster: Any, a_route: Any) -> None:
    source, first = await cluster.host("rep-1", forgetful=True)
    _, second = await cluster.host("rep-2")
    source.moves = {4: second}
    await cluster.publish(a_route("m", first))
    assert texts_of(await events_of(cluster, CHOICES)) == [TEXT + suffix for suffix in SUFFIXES]


@pytest.mark.parametrize("skew", [-1, 1])
async def test_a_move_that_does_not_fit_what_came_is_not_followed(cluster: Any, a_route: Any, skew: int) -> None:
    source, first = await cluster.host("rep-1", skew=skew)
    destination, second = await cluster.host("rep-2")
    _, third = await cluster.host("rep-3")
    source.moves = {4: second}
    await cluster.publish(a_route("m", first, third))
    assert texts_of(await events_of(cluster, CHOICES)) == [TEXT + suffix for suffix in SUFFIXES]
    assert destination.requests == []
    await until_gone(cluster)


async def test_a_move_to_another_revision_is_not_followed(cluster: Any, a_route: Any) -> None:
    source, first = await cluster.host("rep-1")
    destination, second = await cluster.host("rep-2", revision=7)
    _, third = await cluster.host("rep-3")
    source.moves = {4: second}
    await cluster.publish(a_route("m", first, third))
    assert texts_of(await events_of(cluster, STREAMED))[0] == TEXT
    assert destination.requests == []


async def test_a_destination_that_is_dead_by_then_leaves_the_request_to_the_source(cluster: Any, a_route: Any) -> None:
    source, first = await cluster.host("rep-1")
    _, second = await cluster.host("rep-2")
    await cluster.servers["rep-2"][0].stop(None)
    source.moves = {4: second}
    await cluster.publish(a_route("m", first))
    asking = asyncio.create_task(events_of(cluster, CHOICES))
    await asyncio.wait_for(until_resumed(source), 10)
    source.moves = {}
    assert texts_of(await asking) == [TEXT + suffix for suffix in SUFFIXES]
    await until_gone(cluster)


async def test_a_destination_that_refuses_leaves_the_request_to_the_source(cluster: Any, a_route: Any) -> None:
    source, first = await cluster.host("rep-1")
    _, second = await cluster.host("rep-2", refuse_with=Unavailable("draining"))
    source.moves = {4: second}
    await cluster.publish(a_route("m", first))
    asking = asyncio.create_task(events_of(cluster, CHOICES))
    await asyncio.wait_for(until_resumed(source), 10)
    source.moves = {}
    assert texts_of(await asking) == [TEXT + suffix for suffix in SUFFIXES]


async def until_resumed(host: Any) -> None:
    async with host.changed:
        await host.changed.wait_for(lambda: any(request.num_output_tokens for request in host.requests))


async def test_a_client_that_leaves_frees_its_request_at_the_destination(cluster: Any, a_route: Any) -> None:
    source, first = await cluster.host("rep-1")
    destination, second = await cluster.host("rep-2")
    destination.go.clear()
    source.moves = {4: second}
    await cluster.publish(a_route("m", first))
    asking = asyncio.create_task(events_of(cluster, CHOICES))
    await destination.until_running(3)
    asking.cancel()
    await until_gone(cluster)
