"""vLLM's OpenAI front end over an engine that is elsewhere, as openai's client sees it."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from sllm.core.tokens import Finish, FinishReason, TokenOutput
from sllm.errors import EngineFailed, QueueFull
from sllm.rpc.routes import AcquireRequest, AcquireUpdate

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

CHAT = [{"role": "user", "content": "hi"}]
PROMPT_TOKENS = len("user: hi\n")
TEXT = "Hello there."
COMPLETIONS = "/v1/completions"


@pytest.fixture
async def up(vllm_cluster: Any, a_route: Any) -> Any:
    """A cluster that serves the deployment `m` on `rep-1`; its front end is made."""
    _, target = await vllm_cluster.host()
    await vllm_cluster.publish(a_route("m", target, sources=(vllm_cluster.agent_address,)))
    await vllm_cluster.http.post("/tokenize", json={"model": "m", "prompt": "x"})
    return vllm_cluster


@pytest.fixture
async def client(vllm_cluster: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"http://{vllm_cluster.address}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=20) as made:
        yield made


async def test_a_chat_answer_is_whole_and_counted(up: Any, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=CHAT)  # type: ignore[arg-type]
    assert answer.id.startswith("chatcmpl-req-")
    assert answer.model == "m"
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, len(TEXT) + 1)


async def test_a_chat_stream_comes_token_by_token_with_usage(up: Any, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="m",
        messages=CHAT,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(pieces) == TEXT
    assert len(pieces) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(TEXT) + 1


async def test_a_completion_stops_at_its_length(up: Any, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt="x", max_tokens=5)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT[:5], "length")


async def test_a_completion_streams(up: Any, client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model="m", prompt="x", max_tokens=100, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_two_choices_are_two_answers(up: Any, client: openai.AsyncOpenAI, stream: bool) -> None:
    texts = {0: "", 1: ""}
    if stream:
        chunks = await client.chat.completions.create(model="m", messages=CHAT, n=2, seed=1, stream=True)  # type: ignore[arg-type]
        async for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        answer = await client.chat.completions.create(model="m", messages=CHAT, n=2, seed=1)  # type: ignore[arg-type]
        texts = {choice.index: choice.message.content or "" for choice in answer.choices}
    assert texts == {0: TEXT, 1: TEXT}
    sent = [json.loads(request.sampling_params) for request in up.hosts["rep-1"].requests]
    assert [params["seed"] for params in sent] == [1, 2]
    assert len({request.request_id for request in up.hosts["rep-1"].requests}) == 1


async def test_two_prompts_are_two_answers(up: Any, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt=["a", "bc"], max_tokens=4)
    assert [choice.text for choice in answer.choices] == [TEXT[:4]] * 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


async def test_logprobs_name_the_sampled_token_and_its_rivals(up: Any, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m",
        messages=CHAT,  # type: ignore[arg-type]
        logprobs=True,
        top_logprobs=2,
        max_tokens=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == list(TEXT[:3])
    assert {entry.logprob for entry in logprobs.content} == {-0.5}
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["H", "b"]


async def test_logprobs_stream_with_their_tokens(up: Any, client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model="m", prompt="x", logprobs=1, max_tokens=4, stream=True)
    tokens = [t async for chunk in stream for t in (chunk.choices[0].logprobs.tokens or [])]  # type: ignore[union-attr]
    assert tokens == list(TEXT[:4])


async def test_prompt_logprobs_come_with_an_echo(up: Any, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt="abc", echo=True, logprobs=0, max_tokens=2)
    assert answer.choices[0].text == "abcHe"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]


async def test_a_stop_string_ends_the_answer_and_the_engines_work(up: Any, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt="x", stop=[" th"], max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello", "stop")
    await up.hosts["rep-1"].until_running(0)
    assert not up.gateway.dispatcher._load


async def test_tools_are_called(vllm_cluster: Any, a_route: Any, client: openai.AsyncOpenAI) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    _, target = await vllm_cluster.host(answer=[byte + 3 for byte in call.encode()])
    args = {"enable_auto_tool_choice": "true", "tool_call_parser": "hermes"}
    sources = (vllm_cluster.agent_address,)
    await vllm_cluster.publish(a_route("m", target, sources=sources, engine_args=args))
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    asked: dict[str, Any] = {
        "model": "m",
        "messages": CHAT,
        "max_tokens": 200,
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
    }
    answer = await client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    [made] = answer.choices[0].message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "Bern"})
    pieces = [
        made.function
        async for chunk in await client.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        for made in choice.delta.tool_calls or []
    ]
    assert "".join(piece.name or "" for piece in pieces) == "weather"
    assert json.loads("".join(piece.arguments or "" for piece in pieces)) == {"city": "Bern"}


async def test_what_steers_the_engine_reaches_it(up: Any, client: openai.AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    await client.chat.completions.create(
        model="m",
        messages=CHAT,  # type: ignore[arg-type]
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        temperature=0.5,
        logit_bias={"70": -100},
        extra_body={"cache_salt": "mine", "vllm_xargs": {"sllm_num_output_tokens": 3, "other": 1}},
    )
    [request] = up.hosts["rep-1"].requests
    params = json.loads(request.sampling_params)
    assert params["structured_outputs"]["json"] == schema
    assert params["structured_outputs"]["_backend"]
    assert params["logit_bias"] == {"70": -100.0}
    assert params["_eos_token_id"] == 2
    assert params["extra_args"] == {"other": 1}, "what resumes a request is not for clients to say"
    assert request.cache_salt == "mine"
    assert request.num_output_tokens == 0


async def test_sampling_parameters_survive_the_way(vllm_builder: Any) -> None:
    import msgspec
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams as Structured

    params = SamplingParams(
        seed=3,
        stop=["x"],
        stop_token_ids=[5],
        logit_bias={3: -100.0},
        bad_words=["a"],
        logprobs=2,
        extra_args={"a": [1]},
        structured_outputs=Structured(regex="a+"),
        repetition_detection=RepetitionDetectionParams(max_pattern_size=3, min_count=2),
        output_kind=RequestOutputKind.DELTA,
    )
    params._eos_token_id, params._all_stop_token_ids, params._bad_words_token_ids = 7, {5, 7}, [[1, 2]]
    params.structured_outputs._backend = "xgrammar"
    back = msgspec.json.decode(msgspec.json.encode(params), type=SamplingParams)
    assert back == params
    assert vars(back.structured_outputs) == vars(params.structured_outputs)


async def test_text_becomes_tokens_and_text_again(up: Any) -> None:
    tokens = (await up.http.post("/tokenize", json={"model": "m", "prompt": "ab"})).json()["tokens"]
    assert tokens == [100, 101]
    back = await up.http.post("/detokenize", json={"model": "m", "tokens": tokens})
    assert back.json()["prompt"] == "ab"
    assert up.hosts["rep-1"].requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "wrong", "word"),
    [
        ("chat/completions", {"messages": "no list"}, "messages"),
        ("chat/completions", {"messages": CHAT, "temperature": -1}, "temperature"),
        ("chat/completions", {"messages": CHAT, "max_tokens": "many"}, "max_tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 600}]}, "512"),
        ("chat/completions", {"messages": CHAT, "tools": 3}, "tools"),
        ("completions", {"prompt": "x", "logprobs": 1000}, "logprobs"),
        ("completions", {"prompt": "x", "structured_outputs": {"regex": "("}}, "regex"),
        ("completions", {}, "prompt"),
    ],
)
async def test_a_wrong_body_is_400_at_once_streaming_or_not(
    up: Any, path: str, wrong: dict[str, Any], word: str, stream: bool
) -> None:
    answer = await up.http.post(f"/v1/{path}", json={"model": "m", "stream": stream, **wrong})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert word in error["message"]
    assert up.hosts["rep-1"].requests == []


async def test_images_are_refused(up: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [image]}]
    answer = await up.http.post("/v1/chat/completions", json={"model": "m", "messages": messages})
    assert answer.status_code == 400


async def test_two_deployments_do_not_mix(up: Any, a_route: Any, client: openai.AsyncOpenAI) -> None:
    _, other = await up.host("rep-2", answer=[byte + 3 for byte in b"Bye."])
    sources = (up.agent_address,)
    await up.publish(a_route("m", up.target("rep-1"), sources=sources), a_route("b", other, sources=sources))
    answers = await asyncio.gather(
        *(client.completions.create(model=name, prompt="x", max_tokens=50) for name in ("m", "b", "b", "m"))
    )
    assert [a.choices[0].text for a in answers] == [TEXT, "Bye.", "Bye.", TEXT]
    assert up.agent.asked == 1


async def test_a_stream_held_over_a_cold_start_is_whole(
    vllm_cluster: Any, a_route: Any, client: openai.AsyncOpenAI
) -> None:
    _, target = await vllm_cluster.host()
    go = asyncio.Event()

    async def acquire(request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        yield AcquireUpdate(phase="loading", progress=0.42)
        await go.wait()
        yield AcquireUpdate(target=target)

    vllm_cluster.controller.on_acquire = acquire
    await vllm_cluster.publish(a_route("m", sources=(vllm_cluster.agent_address,)))
    asked = {"model": "m", "prompt": "x", "stream": True, "max_tokens": 50}
    async with vllm_cluster.http.stream("POST", COMPLETIONS, json=asked) as answer:
        lines = answer.aiter_lines()
        async for line in lines:
            if line == ": loading 42%":
                break
        go.set()
        events = [line[6:] async for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_503_with_retry_after(
    vllm_cluster: Any, a_route: Any, client: openai.AsyncOpenAI, stream: bool
) -> None:
    async def acquire(request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        raise QueueFull("256 requests wait for 'm'", retry_after_s=4.0)
        yield

    vllm_cluster.controller.on_acquire = acquire
    await vllm_cluster.publish(a_route("m", sources=(vllm_cluster.agent_address,)))
    await vllm_cluster.http.post("/tokenize", json={"model": "m", "prompt": "x"})  # the front end is made
    with pytest.raises(openai.InternalServerError) as refused:
        await client.chat.completions.create(model="m", messages=CHAT, stream=stream)  # type: ignore[call-overload]
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"] == "4"
    assert "256 requests wait" in refused.value.message


@pytest.mark.parametrize("n", [1, 2])
async def test_an_engine_that_fails_mid_stream_is_never_a_short_answer(
    up: Any, a_route: Any, client: openai.AsyncOpenAI, n: int
) -> None:
    counter = itertools.count()
    failed = Finish(reason=FinishReason.ERROR, error=EngineFailed("CUDA error"))

    def fail(output: TokenOutput) -> TokenOutput:
        return output if next(counter) < 7 else replace(output, token_ids=[], finish=failed)

    up.hosts["rep-1"].script = fail
    others = [(await up.host(name, script=fail))[1] for name in ("rep-2", "rep-3")]
    await up.publish(a_route("m", up.target("rep-1"), *others, sources=(up.agent_address,)))
    stream = await client.chat.completions.create(model="m", messages=CHAT, n=n, stream=True)  # type: ignore[arg-type]
    chunks: list[Any] = []
    with pytest.raises(openai.APIError, match="CUDA error"):
        async for chunk in stream:
            chunks.append(chunk)  # noqa: PERF401  # those before the error count
    assert chunks
    assert not any(choice.finish_reason for chunk in chunks for choice in chunk.choices)
    with pytest.raises(openai.APIStatusError, match="CUDA error"):
        await client.chat.completions.create(model="m", messages=CHAT, n=n)  # type: ignore[arg-type]
    assert not up.gateway.dispatcher._load


async def test_a_client_that_leaves_frees_its_request(up: Any) -> None:
    host = up.hosts["rep-1"]
    host.go.clear()
    for stream, n in itertools.product((False, True), (1, 2)):
        asked = {"model": "m", "prompt": "x", "stream": stream, "n": n}
        asking = asyncio.create_task(up.http.post(COMPLETIONS, json=asked))
        await host.until_running(n)
        asking.cancel()
        await host.until_running(0)
        await asyncio.wait_for(up.gateway.dispatcher.requests.none_left(), 10)


async def test_after_all_that_nothing_is_left_in_the_front_end(up: Any, client: openai.AsyncOpenAI) -> None:
    await test_a_client_that_leaves_frees_its_request(up)
    [slot] = up.gateway._front_ends._slots.values()
    [build] = slot.builds.values()
    front_end = build.task.result()
    up.hosts["rep-1"].go.set()
    await client.completions.create(model="m", prompt="x")
    assert front_end._llm.output_processor.request_states == {}
    assert front_end._llm.output_processor.parent_requests == {}


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"tool_call_parser": "no_such", "enable_auto_tool_choice": "true"}, "no_such"),
        ({"reasoning_parser": "no_such"}, "no_such"),
        ({"enable_auto_tool_choice": "true"}, "tool-call-parser"),
        ({"max_logprobs": "many"}, "max-logprobs"),
    ],
)
async def test_wrong_engine_arguments_are_named(
    vllm_cluster: Any, a_route: Any, args: dict[str, str], reason: str
) -> None:
    await vllm_cluster.publish(a_route("m", sources=(vllm_cluster.agent_address,), engine_args=args))
    answer = await vllm_cluster.http.post(COMPLETIONS, json={"model": "m", "prompt": "x"})
    assert answer.status_code == 503
    assert reason in answer.json()["error"]["message"]


async def test_engine_arguments_of_one_deployment_are_not_those_of_the_next(vllm_cluster: Any, a_route: Any) -> None:
    _, target = await vllm_cluster.host()
    sources = (vllm_cluster.agent_address,)
    await vllm_cluster.publish(a_route("odd", target, sources=sources, engine_args={"reasoning_parser": "no_such"}))
    assert (await vllm_cluster.http.post(COMPLETIONS, json={"model": "odd", "prompt": "x"})).status_code == 503
    await vllm_cluster.publish(a_route("m", target, sources=sources))
    assert (await vllm_cluster.http.post(COMPLETIONS, json={"model": "m", "prompt": "x"})).status_code == 200


async def test_a_checkpoint_without_a_tokenizer_says_so(vllm_cluster: Any, a_route: Any) -> None:
    vllm_cluster.agent.files["bare"] = [f for f in vllm_cluster.agent.files["sha256-1"] if f.path == "config.json"]
    await vllm_cluster.publish(a_route("m", sources=(vllm_cluster.agent_address,), digest="bare"))
    answer = await vllm_cluster.http.post(COMPLETIONS, json={"model": "m", "prompt": "x"})
    assert answer.status_code == 503
    assert "front end" in answer.json()["error"]["message"]


def test_a_version_that_was_not_tested_is_refused(vllm_builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from sllm.errors import InvalidConfiguration
    from sllm.gateway import vllm_frontend

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(InvalidConfiguration, match=r"0\.99\.0"):
        vllm_frontend.prepare()
