"""Tokens and sampling parameters to vLLM's structs and back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sllm.core.tokens import FinishReason
from sllm.errors import EngineFailed, InvalidArgument

pytestmark = pytest.mark.vllm


def filled_in(vllm: SimpleNamespace) -> list[Any]:
    """Sampling parameters as a front end sends them: after it has put in what the tokenizer told."""
    params, structured = vllm.sampling.SamplingParams, vllm.sampling.StructuredOutputsParams
    plain = params(
        seed=3,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        stop=["a"],
        stop_token_ids=[4, 5],
        bad_words=["x"],
        logprobs=2,
        prompt_logprobs=1,
        logit_bias={5: 1.5},
        allowed_token_ids=[1, 2, 3],
        max_tokens=7,
        min_tokens=2,
        extra_args={"a": [1]},
        repetition_detection=vllm.sampling.RepetitionDetectionParams(max_pattern_size=3, min_count=2),
    )
    plain._bad_words_token_ids = [[1, 2], [3]]
    plain.update_from_generation_config({"eos_token_id": [2, 9]}, 2)
    grammar = params(structured_outputs=structured(json={"type": "object"}))
    grammar.structured_outputs._backend = "xgrammar"
    grammar.structured_outputs._backend_was_auto = True
    kinds = [
        structured(regex="a+"),
        structured(choice=["a", "b"]),
        structured(grammar='root ::= "a"'),
        structured(json_object=True),
        structured(structural_tag="{}"),
    ]
    greedy, endless = params(temperature=0.0), params(max_tokens=None, ignore_eos=True)
    return [plain, grammar, greedy, endless, *(params(structured_outputs=kind) for kind in kinds)]


def test_sampling_parameters_cross_the_wire_whole(vllm: SimpleNamespace) -> None:
    for params in filled_in(vllm):
        back = vllm.tokens.sampling_params(msgspec.json.encode(params))
        for name in params.__struct_fields__:
            assert getattr(back, name) == getattr(params, name), name
        if params.structured_outputs is not None:
            assert vars(back.structured_outputs) == vars(params.structured_outputs)


def test_the_private_fields_that_an_engine_needs_survive(vllm: SimpleNamespace) -> None:
    back = vllm.tokens.sampling_params(msgspec.json.encode(filled_in(vllm)[0]))
    assert back.eos_token_id == 2
    assert back.all_stop_token_ids == {2, 4, 5, 9}
    assert back.bad_words_token_ids == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'{"temprature": 1.0}', "temprature"),
        (b'{"structured_outputs": {"rejex": "a"}}', "rejex"),
        (b'{"temperature": 9.0}', "temperature"),
        (b'{"max_tokens": "many"}', "max_tokens"),
        (b"{", "sampling parameters"),
        (b"[]", "sampling parameters"),
        (b'{"structured_outputs": {}}', "constraint"),
    ],
)
def test_what_it_does_not_know_is_refused(vllm: SimpleNamespace, data: bytes, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        vllm.tokens.sampling_params(data)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'{"seed": 18446744073709551616}', "seed"),
        (b'{"_bad_words_token_ids": [[1], []]}', "no token"),
        (b'{"_bad_words_token_ids": [[1, 10]]}', "token 10 "),
        (b'{"_bad_words_token_ids": [[-1]]}', "token -1 "),
        (b'{"_all_stop_token_ids": [3, 99], "min_tokens": 1}', "token 99 "),
    ],
)
def test_what_would_break_a_step_is_refused(vllm: SimpleNamespace, data: bytes, complaint: str) -> None:
    params = vllm.tokens.sampling_params(data)
    with pytest.raises(InvalidArgument, match=complaint):
        vllm.tokens.check_for_vocabulary(params, 10)


def test_what_a_front_end_fills_in_is_not(vllm: SimpleNamespace) -> None:
    for params in filled_in(vllm):
        vllm.tokens.check_for_vocabulary(params, 100_000)


def test_a_request_keeps_everything(vllm: SimpleNamespace, request_of: Callable[..., Any]) -> None:
    from dataclasses import replace

    request = replace(request_of(1, [5, 6]), cache_salt="salt", priority=3, arrival_time=1.5, reasoning_ended=False)
    theirs = vllm.tokens.engine_request(77, request, [5], vllm.sampling.SamplingParams())
    assert (theirs.request_id, theirs.prompt_token_ids, theirs.cache_salt) == ("77", [5], "salt")
    assert (theirs.priority, theirs.arrival_time, theirs.reasoning_ended) == (3, 1.5, False)
    assert vllm.tokens.engine_request(77, request_of(1, [5]), [5], None).cache_salt is None


def test_an_output_keeps_everything(vllm: SimpleNamespace) -> None:
    import numpy as np
    import torch

    stats = vllm.stats.PrefillStats()
    stats.set(5, 2, 1)
    output = vllm.tokens.output_of(
        vllm.engine_types.EngineCoreOutput(
            request_id="77",
            new_token_ids=[8, 9],
            new_logprobs=vllm.outputs.LogprobsLists(
                np.array([[8, 1], [9, 2]], dtype=np.int32),
                np.array([[-0.25, -1.5], [-0.5, float("-inf")]], dtype=np.float32),
                np.array([1, 3], dtype=np.int32),
            ),
            new_prompt_logprobs_tensors=vllm.outputs.LogprobsTensors(
                torch.tensor([[4, 6]], dtype=torch.int32), torch.tensor([[-0.125, -2.0]]), torch.tensor([2])
            ),
            finish_reason=vllm.engine_types.FinishReason.STOP,
            stop_reason=9,
            prefill_stats=stats,
        )
    )
    assert (output.key, output.token_ids) == (77, [8, 9])
    assert (output.logprobs.num_rows, output.logprobs.width) == (2, 2)
    assert output.logprobs.token_ids == [8, 1, 9, 2]
    assert output.logprobs.values == [-0.25, -1.5, -0.5, float("-inf")]
    assert output.logprobs.ranks == [1, 3]
    assert (output.prompt_logprobs.token_ids, output.prompt_logprobs.values) == ([4, 6], [-0.125, -2.0])
    assert (output.prefill.num_prompt_tokens, output.prefill.num_cached_tokens) == (5, 3)
    assert (output.finish.reason, output.finish.stop_token_id) == (FinishReason.STOP, 9)


def test_an_output_has_only_what_there_is(vllm: SimpleNamespace) -> None:
    output = vllm.tokens.output_of(vllm.engine_types.EngineCoreOutput(request_id="1", new_token_ids=[8]))
    assert (output.finish, output.logprobs, output.prompt_logprobs, output.prefill) == (None, None, None, None)


@pytest.mark.parametrize("name", ["STOP", "LENGTH", "ABORT", "ERROR", "REPETITION"])
def test_every_finish_reason_has_its_counterpart(vllm: SimpleNamespace, name: str) -> None:
    output = vllm.engine_types.EngineCoreOutput(
        request_id="1",
        new_token_ids=[],
        finish_reason=vllm.engine_types.FinishReason[name],
        stop_reason="again" if name == "REPETITION" else None,
    )
    finish = vllm.tokens.output_of(output).finish
    assert finish.reason is FinishReason[name]
    assert finish.stop_string == ("again" if name == "REPETITION" else None)
    assert isinstance(finish.error, EngineFailed) == (name == "ERROR")
