"""The fake engine: a language model that is a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.core.launch import Launch
from sllm.core.tokens import Finish, FinishReason, Prefill, TokenRequest
from sllm.engine.base import Hooks, Output
from sllm.engine.fake import FakeCore, FakeSettings, build_fake
from sllm.errors import EngineFailed, InvalidArgument


class Timer:
    def __init__(self) -> None:
        self.slept_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


def core(*, capacity: int = 8, max_model_len: int = 512, clock: Timer | None = None, **settings: object) -> FakeCore:
    return FakeCore(
        FakeSettings(**settings),  # type: ignore[arg-type]
        clock or Timer(),
        vocab_size=256,
        capacity=capacity,
        max_model_len=max_model_len,
    )


def ask(prompt: list[int], *, had: int = 0, **params: object) -> TokenRequest:
    return TokenRequest(
        stream_id=1,
        request_id="req-1",  # type: ignore[arg-type]
        token_ids=prompt,
        num_output_tokens=had,
        sampling_params=json.dumps(params).encode(),
    )


def run(engine: FakeCore, request: TokenRequest) -> list[Output]:
    engine.add(1, request)
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


prompts = st.lists(st.integers(0, 255), min_size=1, max_size=20)


@given(prompts, st.integers(0, 2**31), st.integers(1, 30), st.data())
def test_a_resumed_request_goes_on_exactly_as_it_would_have(
    prompt: list[int], seed: int, max_tokens: int, data: st.DataObject
) -> None:
    whole = tokens(run(core(), ask(prompt, seed=seed, max_tokens=max_tokens)))
    cut = data.draw(st.integers(0, max_tokens - 1))
    rest = tokens(run(core(), ask(prompt + whole[:cut], had=cut, seed=seed, max_tokens=max_tokens)))
    assert whole[:cut] + rest == whole
    assert len(whole) == max_tokens


@given(prompts, st.integers(0, 2**31), st.integers(0, 7))
def test_one_that_is_resumed_with_a_wrong_token_goes_on_otherwise(prompt: list[int], seed: int, wrong: int) -> None:
    """Or no test of a resume would see it."""
    whole = tokens(run(core(), ask(prompt, seed=seed, max_tokens=24)))
    had = [token + (at == wrong) for at, token in enumerate(whole[:8])]
    assert tokens(run(core(), ask(prompt + had, had=8, seed=seed, max_tokens=24))) != whole[8:]


@given(prompts, st.integers(0, 1000))
def test_the_same_request_gets_the_same_answer_and_another_seed_another(prompt: list[int], seed: int) -> None:
    first = tokens(run(core(), ask(prompt, seed=seed, max_tokens=16)))
    assert first == tokens(run(core(), ask(prompt, seed=seed, max_tokens=16)))
    assert first != tokens(run(core(), ask(prompt, seed=seed + 1, max_tokens=16)))


def test_it_finishes_at_max_tokens_and_says_so_once() -> None:
    outputs = run(core(), ask([5], max_tokens=3))
    assert [output.finish and output.finish.reason for output in outputs] == [None, None, FinishReason.LENGTH]


def test_it_finishes_at_the_end_of_the_context() -> None:
    assert len(run(core(max_model_len=8), ask([5, 6, 7], max_tokens=100))) == 5


def test_a_stop_token_ends_it_and_is_named() -> None:
    third = tokens(run(core(), ask([5], max_tokens=9)))[2]
    outputs = run(core(), ask([5], max_tokens=9, stop_token_ids=[third]))
    finish = outputs[-1].finish
    assert len(outputs) == 3
    assert finish is not None
    assert (finish.reason, finish.stop_token_id) == (FinishReason.STOP, third)


def test_the_end_token_ends_it_unless_it_is_ignored() -> None:
    third = tokens(run(core(), ask([5], max_tokens=9)))[2]
    assert len(run(core(), ask([5], max_tokens=9, _eos_token_id=third))) == 3
    assert len(run(core(), ask([5], max_tokens=9, _eos_token_id=third, ignore_eos=True))) == 9


def test_only_as_many_advance_as_it_has_room_for() -> None:
    engine = core(capacity=2)
    for key in (1, 2, 3):
        engine.add(key, ask([key], max_tokens=2))
    assert [output.key for output in engine.step()] == [1, 2]
    assert [output.key for output in engine.step()] == [1, 2]
    assert [output.key for output in engine.step()] == [3]


def test_an_aborted_request_makes_no_more_output() -> None:
    engine = core()
    engine.add(1, ask([5], max_tokens=9))
    engine.abort([1, 99])
    assert not engine.has_work


def test_logprobs_have_a_row_per_token_and_the_token_first() -> None:
    outputs = run(core(), ask([5, 6, 7], max_tokens=2, logprobs=3, prompt_logprobs=1))
    for output in outputs:
        assert output.logprobs is not None
        assert (output.logprobs.num_rows, output.logprobs.width) == (1, 4)
        assert output.logprobs.token_ids[0] == output.token_ids[0]
    prompt = outputs[0].prompt_logprobs
    assert prompt is not None
    assert (prompt.num_rows, prompt.width, prompt.token_ids[0]) == (2, 2, 6)
    assert outputs[1].prompt_logprobs is None


def test_the_first_output_says_how_long_the_prompt_was() -> None:
    first, second = run(core(), ask([5, 6, 7], max_tokens=2))
    assert first.prefill is not None
    assert first.prefill.num_prompt_tokens == 3
    assert second.prefill is None


@pytest.mark.parametrize("wrong", [ask([]), ask([5], had=1), ask([0] * 512), ask([5])])
def test_it_refuses_what_it_cannot_serve(wrong: TokenRequest) -> None:
    if wrong.token_ids == [5] and not wrong.num_output_tokens:
        wrong = TokenRequest(stream_id=1, request_id=wrong.request_id, token_ids=[5], sampling_params=b"{")
    engine = core()
    with pytest.raises(InvalidArgument):
        engine.add(1, wrong)
    assert not engine.has_work


def test_each_step_takes_the_time_it_is_told_to() -> None:
    clock = Timer()
    run(core(clock=clock, token_s=0.25), ask([5], max_tokens=4))
    assert clock.slept_s == 1.0


def test_building_takes_its_time_tells_its_progress_and_keeps_to_the_vocabulary(
    make_launch: Callable[..., Launch], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    clock, told = Timer(), list[float]()
    hooks = Hooks(wake=lambda: None, progress=told.append, arrived=told.append, saved=lambda: None)
    engine = build_fake(make_launch(execution_dir=str(tmp_path)), hooks, FakeSettings(load_s=2.0), clock)
    assert clock.slept_s == 2.0
    assert told == [0.0, 0.25, 0.5, 0.75]
    assert max(tokens(run(engine, ask([5], max_tokens=200)))) < 10


def test_building_fails_when_told_to(make_launch: Callable[..., Launch]) -> None:
    hooks = Hooks(wake=lambda: None, progress=lambda share: None, arrived=lambda share: None, saved=lambda: None)
    with pytest.raises(EngineFailed, match="no luck"):
        build_fake(make_launch(), hooks, FakeSettings(build_error="no luck"), Timer())


def test_its_settings_come_from_the_environment() -> None:
    settings = FakeSettings.from_environment(
        {"SLLM_FAKE_TOKEN_S": "0.5", "SLLM_FAKE_PREFILL_S": "0.25", "SLLM_FAKE_CRASH_AT": "3"}
    )
    assert settings == FakeSettings(token_s=0.5, prefill_s=0.25, crash_at=3)
    assert FakeSettings.from_environment({}) == FakeSettings()


def test_a_resumed_request_that_has_ended_finishes_with_no_further_token() -> None:
    whole = tokens(run(core(), ask([5], max_tokens=4)))
    (output,) = run(core(), ask([5, *whole], had=4, max_tokens=4))
    assert (output.token_ids, output.finish) == ([], Finish(reason=FinishReason.LENGTH))
    (output,) = run(core(), ask([5, *whole[:2]], had=2, max_tokens=4, stop_token_ids=[whole[1]]))
    assert (output.token_ids, output.finish) == ([], Finish(reason=FinishReason.STOP, stop_token_id=whole[1]))


def test_a_resumed_request_tells_nothing_of_its_prompt_again() -> None:
    outputs = run(core(), ask([5, 6, 7], had=1, max_tokens=3, prompt_logprobs=1))
    assert [(output.prefill, output.prompt_logprobs) for output in outputs] == [(None, None)] * 2


def recompute(engine: FakeCore, key: int, token_ids: list[int], cache_salt: str = "") -> Output:
    engine.recompute(key, token_ids, cache_salt)
    outputs: list[Output] = []
    while not outputs:
        outputs = [output for output in engine.step() if output.key == key]
    return outputs[0]


def test_a_recompute_makes_no_token_and_fills_the_prefix_cache_in_blocks() -> None:
    engine, prompt = core(), list(range(40))
    first = recompute(engine, 1, prompt)
    assert (first.token_ids, first.finish) == ([], Finish(reason=FinishReason.LENGTH))
    assert first.prefill == Prefill(num_prompt_tokens=40, num_cached_tokens=0)
    assert recompute(engine, 2, [*prompt, *range(40, 50)]).prefill == Prefill(
        num_prompt_tokens=50, num_cached_tokens=2 * engine.block_size
    )
    (output,) = run(engine, ask(prompt, max_tokens=1))
    assert output.prefill == Prefill(num_prompt_tokens=40, num_cached_tokens=32)
    assert not engine.has_work


def test_the_last_token_is_always_computed() -> None:
    engine = core()
    recompute(engine, 1, list(range(32)))
    assert recompute(engine, 2, list(range(32))).prefill == Prefill(num_prompt_tokens=32, num_cached_tokens=16)


def test_what_another_salt_or_another_beginning_has_cached_is_not_found() -> None:
    engine = core()
    recompute(engine, 1, list(range(40)), "a")
    assert recompute(engine, 2, list(range(40)), "b").prefill == Prefill(num_prompt_tokens=40, num_cached_tokens=0)
    other = [9, *range(1, 40)]
    assert recompute(engine, 3, other, "a").prefill == Prefill(num_prompt_tokens=40, num_cached_tokens=0)


def test_a_recompute_waits_until_requests_leave_room() -> None:
    engine = core(capacity=1)
    engine.recompute(1, [5], "")
    engine.add(2, ask([6], max_tokens=2))
    assert [output.key for _ in range(3) for output in engine.step()] == [2, 2, 1]


def test_an_aborted_recompute_is_forgotten() -> None:
    engine = core()
    engine.recompute(1, [5], "")
    engine.abort([1])
    assert not engine.has_work


@pytest.mark.parametrize("token_ids", [[], [0] * 512])
def test_a_recompute_that_can_never_be_done_is_refused(token_ids: list[int]) -> None:
    with pytest.raises(InvalidArgument):
        core().recompute(1, token_ids, "")


def test_what_is_not_cached_takes_its_time() -> None:
    clock = Timer()
    engine = core(clock=clock, prefill_s=0.5)
    recompute(engine, 1, list(range(20)))
    assert clock.slept_s == 10.0
    run(engine, ask(list(range(20)), had=2, max_tokens=4))  # 16 of them are cached
    assert clock.slept_s == 12.0
