"""When one more round pays, and how fast rounds close the gap (paper §5.2)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.migration import RecomputeCost
from sllm.migration.policy import MAX_ROUNDS, Progress, Road, cached, pause_after_round_s, pause_s, pays

ROAD = Road(cost=RecomputeCost(per_token_s=0.001, fixed_s=0.0, observations=9), block_size=16)


def test_a_partly_filled_block_is_computed_again() -> None:
    assert cached(47, 16) == 32
    progress = Progress(prompt_tokens=40, output_tokens=10, interval_s=0.01)
    assert pause_s(progress, 47, ROAD) == pytest.approx(0.018)


def test_the_last_token_is_computed_again_with_its_block() -> None:
    whole = Progress(prompt_tokens=40, output_tokens=8, interval_s=0.01)
    assert pause_s(whole, whole.tokens, ROAD) == pytest.approx(0.016)
    one_more = Progress(prompt_tokens=40, output_tokens=9, interval_s=0.01)
    assert pause_s(one_more, 48, ROAD) == pytest.approx(0.001)


def test_choices_that_have_no_whole_block_each_have_nothing_to_be_kept() -> None:
    assert not pays(Progress(prompt_tokens=15, output_tokens=0, interval_s=0.01, choices=3), 0, 0, ROAD)


def test_the_gap_shrinks_by_the_ratio_of_recomputing_to_decoding_paper_5_2() -> None:
    progress = Progress(prompt_tokens=0, output_tokens=1600, interval_s=0.02)
    assert pause_s(progress, 0, ROAD) == pytest.approx(1.6)
    assert pause_after_round_s(progress, 0, ROAD) == pytest.approx(0.08), "1.6 s, 80 tokens"


def test_choices_are_computed_each() -> None:
    one = Progress(prompt_tokens=100, output_tokens=60, interval_s=0.01)
    three = Progress(prompt_tokens=100, output_tokens=180, interval_s=0.01, choices=3)
    assert pause_s(three, 0, ROAD) == pytest.approx(3 * pause_s(one, 0, ROAD))


def test_an_unknown_interval_counts_as_no_rhythm_at_all() -> None:
    assert pays(Progress(prompt_tokens=500, output_tokens=0, interval_s=0.0), 0, 0, ROAD)


@settings(deadline=None)
@given(
    prompt=st.integers(1, 5000),
    output=st.integers(0, 5000),
    interval_s=st.floats(1e-4, 1.0),
    per_token_s=st.floats(1e-7, 0.1),
    fixed_s=st.floats(0, 0.1),
    block=st.sampled_from([16, 32, 128]),
)
def test_rounds_are_few_and_never_make_the_pause_longer(
    prompt: int, output: int, interval_s: float, per_token_s: float, fixed_s: float, block: int
) -> None:
    road = Road(cost=RecomputeCost(per_token_s=per_token_s, fixed_s=fixed_s, observations=9), block_size=block)
    covered, rounds, now = 0, 0, float(output)
    first = pause_s(Progress(prompt_tokens=prompt, output_tokens=output, interval_s=interval_s), 0, road)
    while pays(
        progress := Progress(prompt_tokens=prompt, output_tokens=int(now), interval_s=interval_s), covered, rounds, road
    ):
        took = pause_s(progress, covered, road)
        covered, rounds, now = progress.tokens, rounds + 1, now + took / interval_s
    assert rounds <= MAX_ROUNDS
    assert pause_s(progress, covered, road) <= first + road.cost.per_token_s * 2
