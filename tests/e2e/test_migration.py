"""Streams that move between servers, or outlive one, on the real vLLM: the client cannot tell (paper §5).

Every answer is compared with that of the undisturbed run: token ids, text, logprobs, finish reason, usage.
"""

from __future__ import annotations

import math
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from e2e.cluster import Cluster
from e2e.operator import Operator
from e2e.streams import Answer, record

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(300)]

COMPLETIONS, CHAT = "/completions", "/chat/completions"
TOKENS = 400


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked. `exact` is False where nobody promises the same answer twice."""

    name: str
    body: dict[str, Any]
    path: str = COMPLETIONS
    exact: bool = True

    @property
    def request(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"model": "moving", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        what = {"prompt": "Python is"} if self.path == COMPLETIONS else {"messages": QUESTION}
        return plain | what | self.body


QUESTION = [{"role": "user", "content": "What is a GPU?"}]
SAMPLED = {"temperature": 1.0, "seed": 11}
SCHEMA = {
    "type": "object",
    "properties": {"list": {"type": "array", "minItems": 90, "maxItems": 90, "items": {"type": "integer"}}},
    "required": ["list"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "count", "parameters": SCHEMA, "strict": True}}
CASES = [
    Case(name="greedy", body={}),
    Case(name="chat", body={}, path=CHAT),
    Case(name="seeded", body=SAMPLED),
    Case(name="seeded, top-p and top-k", body={**SAMPLED, "top_p": 0.9, "top_k": 40}),
    Case(name="three choices", body={**SAMPLED, "n": 3}),
    Case(name="presence penalty", body={"presence_penalty": 1.5}),
    Case(name="frequency penalty", body={"frequency_penalty": 0.8}),
    Case(name="repetition penalty", body={"repetition_penalty": 1.3}),
    Case(name="logit bias", body={"logit_bias": {"40": 5, "41": -100}}),
    Case(name="bad words", body={"bad_words": [" the", " a", "e"]}),
    Case(name="logprobs", body={"logprobs": 3}),
    Case(name="chat logprobs", body={"logprobs": True, "top_logprobs": 2}, path=CHAT),
    Case(name="least tokens before the end", body={**SAMPLED, "min_tokens": 350, "ignore_eos": False}),
    Case(
        name="regular expression",
        body={"structured_outputs": {"regex": "[a-z]{180}-[0-9]{180}"}, "ignore_eos": False},
    ),
    Case(
        name="JSON schema",
        path=CHAT,
        body={
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
            "ignore_eos": False,
        },
    ),
    Case(
        name="tool call",
        path=CHAT,
        body={
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "count"}},
            "ignore_eos": False,
        },
    ),
    Case(name="unseeded", body={"temperature": 1.0}, exact=False),
]
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module")
def cluster(vllm_cluster: Cluster) -> Iterator[Cluster]:
    arguments = ["--engine-arg", "dtype=float32", "--engine-arg", "enable_auto_tool_choice=true"]
    arguments += ["--engine-arg", "tool_call_parser=hermes", "--max-model-len", "1024", "--keep-alive", "10m"]
    vllm_cluster.cli("deploy", "moving", "--checkpoint", "demo", *arguments, "--min", "2", "--max", "2")
    yield vllm_cluster
    vllm_cluster.cli("delete", "moving")


@pytest.fixture(scope="module")
def operator(cluster: Cluster) -> Iterator[Operator]:
    with Operator(cluster) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for case in CASES:
        answers[case.name] = record(cluster, case.path, case.request)
        assert answers[case.name].done, answers[case.name].error
    return answers


# A busy machine may have answered before it hears of a move.
ATTEMPTS = 5

# A token that was recomputed went through another kernel than when it was decoded: its logprobs differ by rounding.
ROUNDING = 1e-4


def same(found: Any, expected: Any) -> bool:
    """Whether two answers to JSON are equal but for the rounding of floats."""
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=ROUNDING, abs_tol=ROUNDING)
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in found)
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def check(case: Case, answer: Answer, expected: Answer) -> None:
    assert answer.error is None
    assert answer.done
    if case.exact:
        assert same(asdict(answer), asdict(expected)), f"{answer}\n\n{expected}"
    else:
        counted = [(len(c.token_ids), c.finish) for c in answer.choices.values()]
        assert counted == [(len(c.token_ids), c.finish) for c in expected.choices.values()]
        assert answer.usage == expected.usage


class Mover:
    """Moves a request to and fro for as long as it runs."""

    def __init__(self, operator: Operator, seed: int) -> None:
        self._operator = operator
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.moves = 0

    def __call__(self, request: str, answer: Answer) -> None:
        if self._thread is None and answer.tokens:
            self._thread = threading.Thread(target=self._run, args=(request,))
            self._thread.start()

    def _run(self, request: str) -> None:
        nodes = self._operator.nodes()
        while not self._over.wait(self._random.uniform(0.0, 0.05)):
            for node in nodes:
                self.moves += self._operator.moves(request, node)

    def end(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()


def move_and_check(cluster: Cluster, operator: Operator, case: Case, expected: Answer, *, seed: int) -> None:
    """Ask while the request is moved there and back, at least, and compare."""
    for attempt in range(ATTEMPTS):
        mover = Mover(operator, seed=(len(CASES) + 1) * attempt + seed)
        try:
            answer = record(cluster, case.path, case.request, mover)
        finally:
            mover.end()
        check(case, answer, expected)
        if mover.moves >= 2:
            return
    raise AssertionError("it never moved there and back")


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_stream_that_moves_to_and_fro_is_the_undisturbed_one(
    cluster: Cluster, operator: Operator, undisturbed: dict[str, Answer], case: Case
) -> None:
    move_and_check(cluster, operator, case, undisturbed[case.name], seed=NAMES.index(case.name))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_stream_outlives_its_engine(cluster: Cluster, undisturbed: dict[str, Answer], case: Case) -> None:
    """Both engines are killed, one after the other, so that it is hit whichever it runs on."""
    full = undisturbed[case.name].tokens
    deaths = sorted(random.Random(NAMES.index(case.name)).sample(range(1, max(3, full - 1)), 2))
    victims = [int(row["pid"]) for row in two_ready(cluster)]

    def watch(_: str, answer: Answer) -> None:
        if deaths and answer.tokens >= deaths[0]:
            deaths.pop(0)
            os.kill(victims.pop(), signal.SIGKILL)

    check(case, record(cluster, case.path, case.request, watch), undisturbed[case.name])
    assert not victims


def two_ready(cluster: Cluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.until(
        lambda: rows if len(rows := cluster.replicas("moving", "ready")) == 2 else None, "two ready replicas"
    )
    return found


def test_a_stop_string_ends_an_answer_that_moves(
    cluster: Cluster, operator: Operator, undisturbed: dict[str, Answer]
) -> None:
    """Moves are timed by chance; the gateway's tests cut a stop string at each of its tokens."""
    text = undisturbed["greedy"].choices[0].text
    stop = text[len(text) // 2 :][:12]
    case = Case(name="stop string", body={"stop": [stop]})
    expected = record(cluster, case.path, case.request)
    assert expected.choices[0].finish == "stop"
    move_and_check(cluster, operator, case, expected, seed=len(CASES))


def test_a_plain_answer_moves_too(cluster: Cluster, operator: Operator) -> None:
    client = cluster.client()
    options: Any = {"model": "moving", "prompt": "Python is", "max_tokens": 900, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    expected = client.completions.create(**options)
    cluster.until(lambda: not operator.running("moving"), "the controller has heard of its end")
    asked: list[Any] = []
    thread = threading.Thread(target=lambda: asked.append(client.completions.create(**options)))
    thread.start()
    request = cluster.until(lambda: operator.running("moving"), "it runs", timeout_s=20)
    moves = [operator.moves(request, node) for node in operator.nodes()]
    thread.join()
    assert any(moves)
    assert replace_id(asked[0]) == replace_id(expected)


def replace_id(answer: Any) -> Any:
    return answer.model_copy(update={"id": "", "created": 0})


def test_a_drained_node_is_empty_and_no_stream_noticed(cluster: Cluster, undisturbed: dict[str, Answer]) -> None:
    case = replace(CASES[0], body={"max_tokens": 800})
    expected = record(cluster, case.path, case.request)
    streams: list[Answer] = []
    threads = [
        threading.Thread(target=lambda: streams.append(record(cluster, case.path, case.request))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    cluster.until(lambda: len(cluster.json("requests")) == 4, "four streams run")
    done = cluster.json("drain", "node-1", "--deadline", "60s")
    assert done["state"] == "done", done
    assert not done["phase"].startswith("0 moved"), done
    for thread in threads:
        thread.join()
    assert all(answer == expected for answer in streams)
    node = next(n for n in cluster.json("nodes") if n["name"] == "node-1")
    assert node["state"] == "cordoned"
    assert [r for r in cluster.json("status")["replicas"] if r["node"] == "node-1"] == []
    cluster.cli("uncordon", "node-1")
    two_ready(cluster)
