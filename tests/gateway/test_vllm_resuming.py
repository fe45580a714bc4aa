"""What vLLM's front end holds of an answer (text not yet shown, half a character, counts, a tool call) is not touched
when the engine under it changes: cut anywhere, answers are those of the undisturbed run.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from gateway.fake_processes import tokens_of

from sllm.core.tokens import TokenOutput
from sllm.errors import Unavailable

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

CHAT = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = {"tools": [{"type": "function", "function": WEATHER}]}
ENGINE_ARGS = {"enable_auto_tool_choice": "true", "tool_call_parser": "hermes"}

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a chat": ("chat/completions", {"messages": CHAT}, "Hello there."),
    "a completion": ("completions", {"prompt": "x"}, "Hello there."),
    "logprobs": ("completions", {"prompt": "x", "logprobs": 2}, "Hello there."),
    "logprobs of a chat": ("chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 2}, "Hello there."),
    "prompt logprobs": ("completions", {"prompt": "abc", "logprobs": 0, "echo": True}, "Hello."),
    "a stop string": ("completions", {"prompt": "x", "stop": ["there", "!"]}, "Hello there. No more."),
    "a stop string that is shown": (
        "completions",
        {"prompt": "x", "stop": ["there"], "include_stop_str_in_output": True},
        "Hello there. No more.",
    ),
    "a length": ("completions", {"prompt": "x", "max_tokens": 7}, "Hello there."),
    "characters of several bytes": ("chat/completions", {"messages": CHAT}, "Grüße, 世界 🙂!"),
    "choices": ("chat/completions", {"messages": CHAT, "n": 2}, "Hello there."),
    "two prompts": ("completions", {"prompt": ["a", "bc"]}, "Hello there."),
    "a tool call": ("chat/completions", {"messages": CHAT, **TOOLS}, CALL),
}


def crash(output: TokenOutput) -> TokenOutput:
    raise Unavailable("the host is going down")


def after(count: int) -> Callable[[TokenOutput], TokenOutput]:
    counter = itertools.count()
    return lambda output: output if next(counter) < count else crash(output)


def kill(cluster: Any, at: int, sequences: int) -> None:
    cluster.hosts["rep-1"].script = after(at * sequences)


def move(cluster: Any, at: int, sequences: int) -> None:
    cluster.hosts["rep-1"].moves = {at: cluster.target("rep-2")}


async def answer_of(cluster: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask for a stream; return all that it said, of each choice, in one."""
    answer = await cluster.http.post(f"/v1/{path}", json=body)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", answer.text
    whole: dict[str, Any] = {}
    for event in events[:-1]:
        chunk = json.loads(event)
        if chunk.get("usage"):
            whole["usage"] = chunk["usage"]
        for choice in chunk["choices"]:
            index = choice.pop("index")
            _gather(whole.setdefault(index, {}), choice)
    return whole


def _gather(so_far: dict[str, Any], news: dict[str, Any]) -> None:
    """Add what one event says: text to text, lists to lists; where the answer was cut into events does not matter."""
    for name, value in news.items():
        if isinstance(value, dict):
            _gather(so_far.setdefault(name, {}), value)
        elif name == "tool_calls" and value:
            for call in value:
                call.pop("id", None)
                _gather(so_far.setdefault(f"call {call.pop('index')}", {}), call)
        elif isinstance(value, str | list) and name not in ("role", "finish_reason", "type"):
            so_far[name] = so_far[name] + value if name in so_far else value
        elif value is not None:
            so_far[name] = value


@pytest.mark.parametrize("way", [kill, move])
@pytest.mark.parametrize("case", CASES)
async def test_cut_anywhere_an_answer_is_the_undisturbed_one(
    vllm_cluster: Any, a_route: Any, case: str, way: Callable[[Any, int, int], None]
) -> None:
    path, asked, text = CASES[case]
    one, first = await vllm_cluster.host("rep-1", answer=tokens_of(text))
    two, second = await vllm_cluster.host("rep-2", answer=tokens_of(text))
    sources = (vllm_cluster.agent_address,)
    await vllm_cluster.publish(a_route("m", first, second, sources=sources, engine_args=ENGINE_ARGS))
    body = {"model": "m", "stream": True, "max_tokens": 200, "stream_options": {"include_usage": True}, **asked}
    body["return_token_ids"] = True
    undisturbed = await answer_of(vllm_cluster, path, body)
    sequences = len(one.requests)
    assert set(undisturbed) == {"usage", *range(sequences)}
    assert undisturbed[0]["finish_reason"]
    for cut in range(len(undisturbed[0]["token_ids"])):
        way(vllm_cluster, cut, sequences)
        before = len(two.requests)
        assert await answer_of(vllm_cluster, path, body) == undisturbed
        assert len(two.requests) > before
    assert not vllm_cluster.gateway.dispatcher._load


async def test_what_is_sampled_without_a_seed_has_one_of_its_own(vllm_cluster: Any, a_route: Any) -> None:
    one, first = await vllm_cluster.host("rep-1")
    two, second = await vllm_cluster.host("rep-2")
    await vllm_cluster.publish(a_route("m", first, second, sources=(vllm_cluster.agent_address,)))

    async def seeds_of(**asked: Any) -> list[int | None]:
        before = len(one.requests)
        answer = await vllm_cluster.http.post("/v1/completions", json={"model": "m", "prompt": "x", **asked})
        assert answer.status_code == 200
        seeds = [json.loads(request.sampling_params).get("seed") for request in one.requests[before:]]
        assert not any(str(seed) in answer.text for seed in seeds if seed is not None and seed > 99)
        return seeds

    drawn = [seed for _ in range(3) for seed in await seeds_of(temperature=0.7, n=2)]
    assert all(isinstance(seed, int) and 0 <= seed < 1 << 63 for seed in drawn)
    assert len(set(drawn)) == 6
    assert await seeds_of(temperature=0.7, n=2, seed=11) == [11, 12]
    assert await seeds_of(temperature=0) == [None]
    kill(vllm_cluster, 3, 1)
    await vllm_cluster.http.post("/v1/completions", json={"model": "m", "prompt": "x"})
    assert two.requests[0].num_output_tokens == 3
    assert two.requests[0].sampling_params == one.requests[-1].sampling_params


@pytest.mark.parametrize(
    ("path", "asked", "max_tokens"),
    [
        ("completions", {"prompt": "x", "max_tokens": 30, "n": 2}, 60),
        ("chat/completions", {"messages": CHAT}, 512 - len("user: hi\n")),
    ],
)
async def test_a_row_says_how_long_an_answer_may_become(
    vllm_cluster: Any, a_route: Any, path: str, asked: dict[str, Any], max_tokens: int
) -> None:
    host, target = await vllm_cluster.host("rep-1")
    await vllm_cluster.publish(a_route("m", target, sources=(vllm_cluster.agent_address,)))
    host.go.clear()
    async with vllm_cluster.raw_post(f"/v1/{path}", {"model": "m", **asked}) as answer:
        await host.until_running(asked.get("n", 1))
        [row] = vllm_cluster.gateway.dispatcher.requests.rows()
        assert row.max_tokens == max_tokens
        host.go.set()
        await answer.readuntil(b"choices")
