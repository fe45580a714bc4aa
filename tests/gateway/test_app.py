"""Paths, bodies and models: what the gateway answers before any front end is asked."""

import asyncio
import json
from typing import Any

import pytest

from sllm.errors import UnsupportedCheckpoint
from sllm.gateway.keys import Keys

COMPLETIONS = "/v1/completions"


def error_of(answer: Any) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_lists_models_in_openais_shape_sleeping_ones_too(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    await cluster.publish(a_route("awake", target), a_route("org/asleep"), a_route("going", deleting=True))
    listed = (await cluster.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == ["awake", "org/asleep"]
    assert listed["data"][0] == {
        "id": "awake",
        "object": "model",
        "created": 1000,
        "owned_by": "sllm",
        "max_model_len": 512,
    }


async def test_one_model_is_found_by_name_with_a_slash_too(cluster: Any, a_route: Any) -> None:
    await cluster.publish(a_route("org/asleep"))
    assert (await cluster.http.get("/v1/models/org/asleep")).json()["id"] == "org/asleep"
    missing = await cluster.http.get("/v1/models/other")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


async def test_an_unknown_model_is_404(cluster: Any, a_route: Any) -> None:
    await cluster.publish(a_route("m"))
    answer = await cluster.http.post(COMPLETIONS, json={"model": "gpt-4", "prompt": "x"})
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"
    assert "'gpt-4'" in error_of(answer)["message"]


async def test_before_the_first_route_table_no_model_is_said_to_be_missing(cluster: Any) -> None:
    answer = await cluster.http.post(COMPLETIONS, json={"model": "m", "prompt": "x"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"", None),
        (b"[1]", "model"),
        (b"{}", "model"),
        (b'{"model": 3}', "model"),
        (b'{"model": ""}', "model"),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
    ],
)
async def test_a_body_that_names_no_model_is_400(cluster: Any, a_route: Any, body: bytes, param: str | None) -> None:
    await cluster.publish(a_route("m"))
    answer = await cluster.http.post(COMPLETIONS, content=body)
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"
    assert error_of(answer)["param"] == param


async def test_a_body_beyond_the_limit_is_413(cluster: Any, a_route: Any) -> None:
    await cluster.publish(a_route("m"))
    answer = await cluster.http.post(COMPLETIONS, content=b" " * 10_000_001)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")


async def test_what_the_front_end_refuses_is_refused_in_openais_terms(cluster: Any, a_route: Any) -> None:
    await cluster.publish(a_route("m"))
    answer = await cluster.http.post(COMPLETIONS, json={"model": "m", "wrong": True})
    assert answer.status_code == 400
    assert error_of(answer) == {"message": "wrong", "type": "invalid_request_error", "param": None, "code": None}


@pytest.mark.parametrize("path", ["/", "/metrics", "/docs", "/v1/embeddings", "/v1/load_lora_adapter", "/load", "/v1"])
async def test_no_other_path_leads_anywhere(cluster: Any, a_route: Any, path: str) -> None:
    await cluster.publish(a_route("m"))
    for method in ("GET", "POST"):
        answer = await cluster.http.request(method, path, json={"model": "m"})
        assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_url")


async def test_a_wrong_method_is_405(cluster: Any) -> None:
    answer = await cluster.http.get(COMPLETIONS)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert (await cluster.http.post("/v1/models")).status_code == 405


async def test_every_answer_has_a_request_id_of_its_own(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    await cluster.publish(a_route("m", target))
    asked = {"model": "m", "prompt": "x"}
    answers = [
        await cluster.http.get("/v1/models"),
        await cluster.http.get("/nowhere"),
        await cluster.http.post(COMPLETIONS, json=asked, headers={"x-request-id": "mine"}),
        await cluster.http.post(COMPLETIONS, json={**asked, "stream": True}),
        await cluster.http.post(COMPLETIONS, json={"model": "other"}),
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(i.startswith("req-") for i in ids)
    assert len(set(ids)) == len(ids)


async def test_the_engine_knows_a_request_by_that_id(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host()
    await cluster.publish(a_route("m", target))
    answer = await cluster.http.post(COMPLETIONS, json={"model": "m", "prompt": "x"})
    assert answer.json()["text"] == "Hello there."
    assert [r.request_id for r in host.requests] == [answer.headers["x-request-id"]]


async def test_health_needs_no_controller(cluster: Any) -> None:
    answer = await cluster.http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


async def test_a_front_end_that_cannot_be_made_is_503_with_the_reason(cluster: Any, a_route: Any) -> None:
    cluster.builder.problem = UnsupportedCheckpoint("no tokenizer")
    await cluster.publish(a_route("m"))
    answer = await cluster.http.post(COMPLETIONS, json={"model": "m", "prompt": "x"})
    assert answer.status_code == 503
    assert "no tokenizer" in error_of(answer)["message"]
    assert "retry-after" in answer.headers


async def test_a_request_waits_for_its_front_end_and_a_stream_is_told(cluster: Any, a_route: Any) -> None:
    _, target = await cluster.host()
    cluster.builder.gate.clear()
    await cluster.publish(a_route("m", target))
    asked = {"model": "m", "prompt": "x", "stream": True}
    async with cluster.http.stream("POST", COMPLETIONS, json=asked) as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == ": waiting for the front end"
        cluster.builder.gate.set()
        events = [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
    assert "".join(event["text"] for event in events) == "Hello there."


async def test_a_client_that_leaves_before_the_front_end_is_made_leaves_nothing(cluster: Any, a_route: Any) -> None:
    cluster.builder.gate.clear()
    await cluster.publish(a_route("m"))
    asked = {"model": "m", "prompt": "x", "stream": True}
    async with cluster.http.stream("POST", COMPLETIONS, json=asked) as answer:
        assert await anext(answer.aiter_lines()) == ": waiting for the front end"
    await asyncio.wait_for(cluster.gateway.dispatcher.requests.none_left(), 10)


async def test_off_loopback_nothing_but_health_is_answered(cluster: Any) -> None:
    cluster.gateway._app._keys = Keys(open_to_all=False)
    answer = await cluster.http.get("/v1/models")
    assert (answer.status_code, error_of(answer)["type"]) == (401, "authentication_error")
    assert (await cluster.http.get("/health")).status_code == 200
