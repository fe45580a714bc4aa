"""The main job on the real vLLM: a cold request starts a replica and streams its answer."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest
from e2e.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(300)]

MESSAGES: Any = [{"role": "user", "content": "What is a GPU?"}]
GREEDY: Any = {"model": "chat", "messages": MESSAGES, "temperature": 0, "max_tokens": 48}


@pytest.fixture(scope="module")
def cluster(vllm_cluster: Cluster) -> Cluster:
    arguments = ["--engine-arg", "dtype=float32", "--engine-arg", "enable_auto_tool_choice=true"]
    arguments += ["--engine-arg", "tool_call_parser=hermes", "--max-model-len", "1024", "--keep-alive", "10m"]
    vllm_cluster.cli("deploy", "chat", "--checkpoint", "demo", *arguments)
    return vllm_cluster


def streamed(client: openai.OpenAI, **options: Any) -> tuple[str, str | None]:
    text, finish = "", None
    for chunk in client.chat.completions.create(**{**GREEDY, "stream": True, **options}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish


def post(cluster: Cluster, path: str, body: bytes) -> tuple[int, dict[str, Any], Any]:
    request = urllib.request.Request(
        cluster.base_url.removesuffix("/v1") + path, data=body, headers={"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


def test_a_cold_stream_a_warm_stream_and_a_plain_answer_are_equal(cluster: Cluster) -> None:
    assert cluster.replicas("chat") == []
    client = cluster.client()
    cold = streamed(client)
    assert cold[0]
    assert cold[1] in ("stop", "length")
    assert streamed(client) == cold
    plain = client.chat.completions.create(**GREEDY)
    assert (plain.choices[0].message.content, plain.choices[0].finish_reason) == cold
    assert plain.usage is not None
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens


def test_no_interpreter_is_started_to_look_at_a_model(cluster: Cluster) -> None:
    """vLLM would start one, for ten seconds and more, and keep what it found in its cache."""
    streamed(cluster.client())
    assert list(cluster.state.rglob("modelinfos")) == []


def test_scaled_to_zero_it_starts_again_from_dram_and_answers_the_same(cluster: Cluster) -> None:
    client = cluster.client()
    before = streamed(client)
    node = cluster.replicas("chat", "ready")[0]["node"]
    cluster.cli("scale", "chat", "--replicas", "0")
    assert cluster.replicas("chat") == []
    tiers = next(n for n in cluster.json("nodes") if n["name"] == node)["tiers"]
    assert tiers["dram"]["used_bytes"] > 0
    assert streamed(client) == before
    assert cluster.replicas("chat", "ready")[0]["node"] == node, "the node that has it in DRAM is preferred"


def test_models_are_listed_in_openais_shape_even_when_asleep(cluster: Cluster) -> None:
    cluster.cli("deploy", "org/sleeper", "--checkpoint", "demo")
    models = {m.id: m for m in cluster.client().models.list()}
    assert {"chat", "org/sleeper"} <= set(models)
    assert models["org/sleeper"].object == "model"
    assert cluster.client().models.retrieve("chat").id == "chat"
    cluster.cli("delete", "org/sleeper")
    assert "org/sleeper" not in {m.id for m in cluster.client().models.list()}


def test_completions_with_choices_logprobs_seed_and_stop(cluster: Cluster) -> None:
    client = cluster.client()
    options: Any = {"model": "chat", "prompt": "Python is", "max_tokens": 16, "seed": 7, "temperature": 1.0, "n": 3}
    first = client.completions.create(**options, logprobs=2)
    again = client.completions.create(**options, logprobs=2)
    assert [c.text for c in first.choices] == [c.text for c in again.choices]
    assert len({c.text for c in first.choices}) > 1
    for choice in first.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    text = client.completions.create(model="chat", prompt="Python is", max_tokens=16, temperature=0).choices[0].text
    stop = text[4:8]
    stopped = client.completions.create(model="chat", prompt="Python is", max_tokens=16, temperature=0, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == text[: text.index(stop)]


def test_a_json_schema_is_kept(cluster: Cluster) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = cluster.client().chat.completions.create(**{**GREEDY, "response_format": form})
    # The demo model likes blanks, which JSON allows without end: it may not come to the last brace.
    assert re.fullmatch(r'\s*\{\s*"n"\s*:\s*[0-9]{1,2}\s*\}?\s*', answer.choices[0].message.content or "")


def test_a_regular_expression_and_a_choice_are_kept(cluster: Cluster) -> None:
    client = cluster.client()
    regex = client.chat.completions.create(**GREEDY, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}})
    assert re.fullmatch("[0-9]{4}", regex.choices[0].message.content or "")
    choice = client.chat.completions.create(**GREEDY, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.choices[0].message.content in ("yes", "no")


def test_a_named_tool_is_called(cluster: Cluster) -> None:
    tool: Any = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"days": {"type": "integer", "maximum": 9}}},
        },
    }
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    answer = cluster.client().chat.completions.create(**{**GREEDY, "tools": [tool], "tool_choice": choice})
    assert answer.choices[0].message.tool_calls is not None
    call: Any = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    assert isinstance(json.loads(call.function.arguments), dict)


def test_tokenize_counts_what_a_completion_is_charged(cluster: Cluster) -> None:
    status, tokens, _ = post(cluster, "/tokenize", b'{"model": "chat", "prompt": "Python is"}')
    assert status == 200
    answer = cluster.client().completions.create(model="chat", prompt="Python is", max_tokens=1)
    assert answer.usage is not None
    assert tokens["count"] == answer.usage.prompt_tokens


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b'{"model": "nobody", "messages": []}', 404),
        ("/v1/chat/completions", b'{"model": "chat"}', 400),
        ("/v1/chat/completions", b"not json", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/completions", b'{"model": "chat", "prompt": "x", "max_tokens": -1}', 400),
        ("/v1/completions", b'{"model": "chat", "prompt": "x", "max_tokens": 100000}', 400),
        ("/v1/completions", b'{"model": "chat", "prompt": "x", "n": 17}', 400),
        ("/v1/completions", b'{"model": "chat", "prompt": [' + b'"x",' * 256 + b'"x"]}', 400),
        ("/v1/nothing", b"{}", 404),
        ("/inference/v1/generate", b"{}", 404),
        ("/sleep", b"{}", 404),
    ],
)
def test_a_bad_request_is_refused_in_openais_shape(cluster: Cluster, path: str, body: bytes, status: int) -> None:
    got, answer, headers = post(cluster, path, body)
    assert got == status
    assert set(answer["error"]) >= {"message", "type", "param", "code"}
    assert headers["x-request-id"].startswith("req-")


def test_a_held_stream_gets_comments_with_progress_until_it_starts(cluster: Cluster) -> None:
    cluster.cli("scale", "chat", "--replicas", "0")
    body = json.dumps({**GREEDY, "stream": True}).encode()
    request = urllib.request.Request(
        cluster.base_url + "/chat/completions", data=body, headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        lines = [line.decode().strip() for line in response]
    assert response.status == 200
    data = [line for line in lines if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]"
    comments = [line for line in lines if line.startswith(":")]
    assert lines[: len(comments)].count("") <= len(comments), "comments come first"
    # A start from DRAM may be quicker than the first comment is due.
    for comment in comments:
        assert any(word in comment for word in ("waiting", "queued", "forking", "loading", "building")), comment


def test_requests_are_listed_while_they_run_and_freed_when_the_client_leaves(cluster: Cluster) -> None:
    stream = cluster.client().chat.completions.create(
        **{**GREEDY, "max_tokens": 900, "stream": True}, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    # Gateways report every second: at first it may still be listed as held.
    rows = cluster.until(lambda: [r for r in cluster.json("requests") if r["state"] == "running"], "listed")
    assert rows[0]["id"].startswith("req-")
    assert rows[0]["deployment"] == "chat"
    assert rows[0]["prompt_tokens"] > 0
    stream.close()
    cluster.until(lambda: not cluster.json("requests"), "freed", timeout_s=10)
    replica = cluster.replicas("chat", "ready")[0]
    cluster.until(lambda: cluster.replicas("chat", "ready")[0]["running"] == 0, "the engine is idle", timeout_s=10)
    assert cluster.cli("logs", replica["id"]).stdout


def test_a_request_beyond_the_models_length_is_a_400_not_a_crash(cluster: Cluster) -> None:
    with pytest.raises(openai.BadRequestError):
        cluster.client().completions.create(model="chat", prompt="word " * 3000, max_tokens=1)
