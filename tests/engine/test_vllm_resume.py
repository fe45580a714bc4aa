"""Exact resume on the real engine, in float32: what goes on elsewhere equals what would have gone on here.

Every feature x every cut x (nothing cached, all full blocks cached). Tokens, ids of candidates, ranks and finish are
equal; values of logprobs within the order in which float32 is summed (a prompt's kernels are not a decoding step's).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from engine.vllm_child import Play

from sllm.core.tokens import Finish, FinishReason, Prefill, TokenRequest
from sllm.engine.base import Output
from sllm.errors import InvalidArgument

pytestmark = [pytest.mark.vllm, pytest.mark.e2e]

TESTS = Path(__file__).resolve().parent.parent
MODEL = TESTS.parent / "examples" / "demo-model"
END = 2  # the model's end token
PROMPT = [(i * 37) % 1900 + 60 for i in range(100)]
NEW = 40
FLOAT_ORDER = 1e-4


class Child:
    """An engine in a process of its own."""

    def __init__(self, log: Path, **changes: Any) -> None:
        ours, theirs = socket.socketpair()
        code = "from engine.vllm_child import main; main()"
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), str(MODEL), json.dumps(changes)],
                pass_fds=[theirs.fileno()],
                stdout=out,
                stderr=out,
                env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent)},
            )
        theirs.close()
        self._connection = Connection(ours.detach())
        self.block_size: int = self._connection.recv()

    def play(self, script: Play) -> dict[int, list[Output]]:
        self._connection.send(script)
        answer: Any = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    def ask(self, request: TokenRequest) -> list[Output]:
        return self.play(Play(requests={1: request}))[1]

    def close(self) -> None:
        self._connection.close()
        assert self._process.wait() == 0


@pytest.fixture(scope="module")
def engine(vllm: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    child = Child(tmp_path_factory.mktemp("child") / "log")
    yield child
    child.close()


def request(params: Any, *, salt: str = "") -> TokenRequest:
    return TokenRequest(
        stream_id=1,
        request_id="req-1",  # type: ignore[arg-type]
        token_ids=PROMPT,
        sampling_params=msgspec.json.encode(params),
        cache_salt=salt,
    )


def resumed(first: TokenRequest, had: list[int], *, salt: str) -> TokenRequest:
    return replace(first, token_ids=[*PROMPT, *had], num_output_tokens=len(had), cache_salt=salt)


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


# --- the matrix ----------------------------------------------------------------------------


class Features:
    """Sampling parameters as a front end sends them. `plain` is what greedy decoding says without them."""

    def __init__(self, vllm: SimpleNamespace, plain: list[int]) -> None:
        self._sampling = vllm.sampling
        self.plain = plain

    def params(self, **values: Any) -> Any:
        changed = {"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 2, **values}
        return self._sampling.SamplingParams(**changed)

    def bad_words(self, *words: list[int]) -> Any:
        params = self.params()
        params._bad_words_token_ids = list(words)
        return params

    def grammar(self, logit_bias: dict[int, float] | None = None, **kind: Any) -> Any:
        structured = self._sampling.StructuredOutputsParams(**kind)
        structured._backend = "xgrammar"
        params = self.params(
            ignore_eos=False, temperature=1.0, seed=3, structured_outputs=structured, logit_bias=logit_bias
        )
        params.update_from_generation_config({}, END)
        return params

    def repetition(self) -> Any:
        detection = self._sampling.RepetitionDetectionParams(max_pattern_size=8, min_count=3)
        return self.params(repetition_detection=detection, max_tokens=200)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 12}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CLOSING = {95: -100.0}  # "}": an object would end before it begins
FEATURES: dict[str, Callable[[Features], Any]] = {
    "greedy": lambda f: f.params(),
    "seed": lambda f: f.params(temperature=1.0, seed=11),
    "seed, top_p, top_k": lambda f: f.params(temperature=0.9, seed=7, top_p=0.9, top_k=50),
    "seed, min_p": lambda f: f.params(temperature=1.3, seed=8, min_p=0.05),
    "choice of three (n)": lambda f: f.params(temperature=1.0, seed=11 + 2),
    "presence penalty": lambda f: f.params(presence_penalty=1.5),
    "frequency penalty": lambda f: f.params(frequency_penalty=1.2),
    "repetition penalty": lambda f: f.params(repetition_penalty=1.3),
    "penalties, seed": lambda f: f.params(temperature=1.0, seed=5, presence_penalty=1.0, repetition_penalty=1.2),
    "stop_token_ids": lambda f: f.params(stop_token_ids=[f.plain[30]]),
    "min_tokens, stop_token_ids": lambda f: f.params(stop_token_ids=[f.plain[20]], min_tokens=30),
    "end token": lambda f: ended_by(f.params(ignore_eos=False, logit_bias={END: 6.0}, min_tokens=12)),
    "bad words": lambda f: f.bad_words(f.plain[4:5], f.plain[20:21]),
    "bad words across the cut": lambda f: f.bad_words(*(f.plain[i : i + 2] for i in range(NEW - 1))),
    "logit bias": lambda f: f.params(logit_bias={f.plain[3]: -100.0, 700: 4.0}),
    "allowed_token_ids": lambda f: f.params(allowed_token_ids=list(range(100, 160))),
    "logprobs of all": lambda f: f.params(logprobs=20),
    "prompt_logprobs": lambda f: f.params(prompt_logprobs=1),
    "regex": lambda f: f.grammar(regex=r"[a-z]{20}-[0-9]{12}\."),
    "grammar": lambda f: f.grammar(grammar='root ::= ("a long answer" | "another one") " that is " [a-z]+ "!"'),
    "JSON schema": lambda f: f.grammar(json=SCHEMA, disable_any_whitespace=True),
    "JSON object": lambda f: f.grammar(CLOSING, json_object=True),
    "repetition": lambda f: f.repetition(),
}

NO_EFFECT = {"greedy", "logprobs of all", "prompt_logprobs"}  # on tokens


def ended_by(params: Any) -> Any:
    params.update_from_generation_config({}, END)
    return params


@pytest.fixture(scope="module")
def features(vllm: SimpleNamespace, engine: Child) -> Features:
    plain = vllm.sampling.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    return Features(vllm, tokens(engine.ask(request(plain))))


def cuts(whole: list[int], block_size: int) -> set[int]:
    """After the first token, in the middle, before the last one, and where prompt and output fill a block."""
    boundary = -len(PROMPT) % block_size or block_size
    return {cut for cut in (1, len(whole) // 2, len(whole) - 1, boundary) if 0 < cut < len(whole)}


def assert_same(rest: list[Output], whole: list[Output], cut: int, what: str) -> None:
    expected = whole[cut:]  # a token a step
    assert tokens(rest) == tokens(expected), what
    assert rest[-1].finish == whole[-1].finish, what
    for ours, theirs in zip(rest, expected, strict=True):
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        assert ours.logprobs.token_ids == theirs.logprobs.token_ids, what
        assert ours.logprobs.ranks == theirs.logprobs.ranks, what
        assert ours.logprobs.values == pytest.approx(theirs.logprobs.values, abs=FLOAT_ORDER), what
    assert {output.prefill for output in rest} == {output.prompt_logprobs for output in rest} == {None}


@pytest.mark.parametrize("name", FEATURES)
def test_a_resumed_request_goes_on_as_if_nothing_had_happened(engine: Child, features: Features, name: str) -> None:
    first = request(FEATURES[name](features), salt=name)
    whole = engine.ask(first)
    had = tokens(whole)
    assert len(had) > 4
    assert (had == features.plain) == (name in NO_EFFECT)  # else it would prove nothing of the feature
    moved = {}
    for cut in cuts(had, engine.block_size):
        moved[2 * cut] = resumed(first, had[:cut], salt=f"{name}, {cut}")  # nothing is cached
        moved[2 * cut + 1] = resumed(first, had[:cut], salt=name)  # all full blocks are
    for key, rest in engine.play(Play(requests=moved)).items():
        assert_same(rest, whole, key // 2, f"cut at {key // 2}, {'nothing' if key % 2 == 0 else 'all'} cached")


@pytest.mark.parametrize("name", ["greedy", "seed"])
def test_so_does_one_that_is_alone(engine: Child, features: Features, name: str) -> None:
    first = request(FEATURES[name](features), salt=f"alone, {name}")
    whole = engine.ask(first)
    for cut in cuts(tokens(whole), engine.block_size):
        for salt in (first.cache_salt, f"alone, {name}, {cut}"):
            rest = engine.ask(resumed(first, tokens(whole)[:cut], salt=salt))
            assert_same(rest, whole, cut, f"cut at {cut}, {salt}")


# --- what else a resumed request meets -----------------------------------------------------


@pytest.mark.parametrize("name", ["greedy", "seed", "presence penalty", "JSON schema"])
def test_it_may_move_any_number_of_times(engine: Child, features: Features, name: str) -> None:
    first = request(FEATURES[name](features), salt=f"often, {name}")
    whole = engine.ask(first)
    had: list[int] = []
    while len(had) < len(whole) - 5:
        leave = Play(requests={1: resumed(first, had, salt="often") if had else first}, leave={1: 5})
        had += tokens(engine.play(leave)[1])
    assert had == tokens(whole)[: len(had)]
    assert_same(engine.ask(resumed(first, had, salt="often")), whole, len(had), f"cut at {len(had)}")


def test_it_does_not_disturb_those_that_are_there(engine: Child, features: Features) -> None:
    names = ["greedy", "seed", "presence penalty", "regex"]
    firsts = {key: request(FEATURES[name](features), salt=f"there, {key}") for key, name in enumerate(names, 1)}
    alone = {key: engine.ask(first) for key, first in firsts.items()}
    late = resumed(firsts[2], tokens(alone[2])[:7], salt="late")
    together = engine.play(Play(requests={**firsts, 9: late}, late={9: 5, 2: 2, 3: 11}))
    for key in firsts:
        assert tokens(together[key]) == tokens(alone[key])
    assert_same(together[9], alone[2], 7, "late")


def test_hundreds_of_seeded_tokens_are_resumed_exactly(engine: Child, features: Features) -> None:
    first = request(features.params(temperature=1.0, seed=5, max_tokens=400), salt="long")
    whole = engine.ask(first)
    assert_same(engine.ask(resumed(first, tokens(whole)[:380], salt="other")), whole, 380, "cut at 380")


def test_one_that_has_ended_finishes_with_no_further_token(engine: Child, features: Features) -> None:
    first = request(features.params())
    ends = {
        1: (resumed(first, features.plain, salt=""), Finish(reason=FinishReason.LENGTH)),
        2: (
            resumed(request(features.params(stop_token_ids=[features.plain[5]])), features.plain[:6], salt=""),
            Finish(reason=FinishReason.STOP, stop_token_id=features.plain[5]),
        ),
        3: (
            resumed(request(ended_by(features.params(ignore_eos=False))), [7, END], salt=""),
            Finish(reason=FinishReason.STOP),
        ),
    }
    outputs = engine.play(Play(requests={key: one for key, (one, _) in ends.items()}))
    for key, (_, finish) in ends.items():
        assert [(output.token_ids, output.finish) for output in outputs[key]] == [([], finish)]


def test_one_that_does_not_follow_its_grammar_is_refused_alone(engine: Child, features: Features) -> None:
    first = request(FEATURES["regex"](features))
    outputs = engine.play(Play(requests={1: request(features.params()), 2: resumed(first, [20], salt="")}))
    (refused,) = outputs[2]
    assert refused.finish is not None
    assert isinstance(refused.finish.error, InvalidArgument)
    assert tokens(outputs[1]) == features.plain


def test_one_without_a_prompt_or_beyond_the_context_is_refused(engine: Child, features: Features) -> None:
    first = request(features.params())
    for wrong in (replace(first, num_output_tokens=100), resumed(first, [5] * 413, salt="")):
        with pytest.raises(InvalidArgument):
            engine.ask(wrong)
    full = engine.ask(resumed(first, [5] * 412, salt=""))
    assert [output.finish for output in full] == [Finish(reason=FinishReason.LENGTH)]


# --- recomputes ----------------------------------------------------------------------------


def recomputed(engine: Child, token_ids: list[int], salt: str) -> Output:
    (output,) = engine.play(Play(recomputes={1: (token_ids, salt)}))[1]
    return output


def test_a_recompute_makes_no_token_and_fills_the_prefix_cache(engine: Child, features: Features) -> None:
    size = engine.block_size
    first = recomputed(engine, PROMPT * 2, "fill")
    assert (first.token_ids, first.finish, first.logprobs) == ([], Finish(reason=FinishReason.LENGTH), None)
    assert first.prefill == Prefill(num_prompt_tokens=200, num_cached_tokens=0)
    again = recomputed(engine, [*PROMPT * 2, *range(300, 340)], "fill")
    assert again.prefill == Prefill(num_prompt_tokens=240, num_cached_tokens=200 // size * size)
    asked = engine.ask(replace(request(features.params()), token_ids=PROMPT * 2, cache_salt="fill"))
    assert asked[0].prefill == Prefill(num_prompt_tokens=200, num_cached_tokens=199 // size * size)
    assert recomputed(engine, PROMPT * 2, "elsewhere").prefill == Prefill(num_prompt_tokens=200, num_cached_tokens=0)


def test_a_request_is_resumed_exactly_behind_a_recompute(engine: Child, features: Features) -> None:
    for name in ("greedy", "seed", "JSON schema"):
        first = request(FEATURES[name](features))
        whole = engine.ask(first)
        half = len(whole) // 2
        recomputed(engine, [*PROMPT, *tokens(whole)[: half - 2]], name + "!")
        assert_same(engine.ask(resumed(first, tokens(whole)[:half], salt=name + "!")), whole, half, name)


def test_recomputes_let_requests_go_first_and_disturb_none(engine: Child, features: Features) -> None:
    requests = {key: request(features.params(), salt=f"first, {key}") for key in range(1, 13)}  # of which 8 run
    recomputes = {key: ([*PROMPT, key], "busy") for key in (20, 21)}
    outputs = engine.play(Play(requests=requests, recomputes=recomputes, late={1: 1, 2: 1}))
    assert all(tokens(outputs[key]) == features.plain for key in requests)
    assert all(len(outputs[key]) == 1 for key in recomputes)


def test_a_long_recompute_beside_a_request_disturbs_it_not_and_is_found_whole(
    engine: Child, features: Features
) -> None:
    long = [5 + number % 400 for number in range(460)]
    script = Play(requests={1: request(features.params(), salt="beside")}, recomputes={9: (long, "long")}, late={9: 2})
    outputs = engine.play(script)
    assert tokens(outputs[1]) == features.plain
    assert [output.prefill for output in outputs[9]] == [Prefill(num_prompt_tokens=460, num_cached_tokens=0)]
    kept = 459 // engine.block_size * engine.block_size
    assert recomputed(engine, long, "long").prefill == Prefill(num_prompt_tokens=460, num_cached_tokens=kept)


def test_a_recompute_that_can_never_be_done_is_refused(engine: Child) -> None:
    for wrong in ([], [10_000], [5] * 512):
        with pytest.raises(InvalidArgument):
            recomputed(engine, wrong, "")
