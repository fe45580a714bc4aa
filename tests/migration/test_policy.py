"""When one more round pays, and how fast rounds close the gap (paper §5.2)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.migration import RecomputeCost
from sllm.migration.policy import (
    MAX_FILL_S,
    MAX_ROUNDS,
    Next,
    Progress,
    Road,
    cached,
    fill_s,
    following,
    full,
    pause_after_round_s,
    pause_s,
)

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
    choices = Progress(prompt_tokens=45, output_tokens=0, interval_s=0.0, choices=3)
    assert following(choices, 0, 0, ROAD, left_s=60.0) is Next.HAND_OVER


def test_the_gap_shrinks_by_the_ratio_of_recomputing_to_decoding_paper_5_2() -> None:
    progress = Progress(prompt_tokens=0, output_tokens=1600, interval_s=0.02)
    assert pause_s(progress, 0, ROAD) == pytest.approx(1.6)
    assert pause_after_round_s(progress, 0, ROAD) == pytest.approx(0.08), "1.6 s, 80 tokens"


def test_choices_are_computed_each() -> None:
    one = Progress(prompt_tokens=100, output_tokens=60, interval_s=0.01)
    three = Progress(prompt_tokens=300, output_tokens=180, interval_s=0.01, choices=3)
    assert pause_s(three, 0, ROAD) == pytest.approx(3 * pause_s(one, 0, ROAD))


def test_an_unknown_interval_counts_as_no_rhythm_at_all() -> None:
    assert (
        following(Progress(prompt_tokens=500, output_tokens=0, interval_s=0.0), 0, 0, ROAD, left_s=60.0) is Next.ROUND
    )


def test_a_long_gap_is_sent_at_once_and_the_last_round_when_a_block_is_full() -> None:
    long = Progress(prompt_tokens=100, output_tokens=900, interval_s=0.01)
    assert following(long, 0, 0, ROAD, left_s=60.0) is Next.ROUND
    short = Progress(prompt_tokens=100, output_tokens=908, interval_s=0.01)
    assert following(short, 1000, 1, ROAD, left_s=60.0) is Next.FILL
    assert full(short, 16) == 1008


def test_a_block_that_has_just_been_filled_is_not_waited_for() -> None:
    whole = Progress(prompt_tokens=0, output_tokens=48, interval_s=0.01)
    assert (full(whole, 16), fill_s(whole, 16)) == (48, 0.0)
    assert fill_s(Progress(prompt_tokens=0, output_tokens=49, interval_s=0.01), 16) == pytest.approx(0.15)


def test_the_blocks_of_several_choices_are_not_waited_for() -> None:
    two = Progress(prompt_tokens=200, output_tokens=816, interval_s=0.01, choices=2)
    assert following(two, 1000, 1, ROAD, left_s=60.0) is not Next.FILL


SLOW = Road(cost=RecomputeCost(per_token_s=0.1, fixed_s=1.0, observations=9), block_size=16)


@pytest.mark.parametrize(("interval_s", "awaited"), [(MAX_FILL_S / 8.1, True), (MAX_FILL_S / 7.9, False)])
def test_a_block_that_takes_too_long_to_fill_is_not_waited_for(interval_s: float, awaited: bool) -> None:
    eight_missing = Progress(prompt_tokens=100, output_tokens=900, interval_s=interval_s)
    assert (following(eight_missing, 1000, 1, SLOW, left_s=60.0) is Next.FILL) is awaited


@pytest.mark.parametrize(("left_s", "awaited"), [(0.045, True), (0.035, False)])
def test_nor_one_that_is_full_after_the_deadline(left_s: float, awaited: bool) -> None:
    eight_missing = Progress(prompt_tokens=100, output_tokens=900, interval_s=0.005)
    assert (following(eight_missing, 1000, 1, ROAD, left_s=left_s) is Next.FILL) is awaited


def test_nor_one_of_which_nobody_knows_how_long_it_takes() -> None:
    unknown = Progress(prompt_tokens=100, output_tokens=900, interval_s=0.0)
    assert following(unknown, 1000, 1, ROAD, left_s=60.0) is not Next.FILL


def test_a_handover_that_has_hardly_anything_to_compute_waits_for_no_block() -> None:
    just_after = Progress(prompt_tokens=0, output_tokens=1009, interval_s=0.0005)
    assert following(just_after, 1008, 1, ROAD, left_s=60.0) is Next.HAND_OVER


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
    while True:
        progress = Progress(prompt_tokens=prompt, output_tokens=int(now), interval_s=interval_s)
        choice = following(progress, covered, rounds, road, left_s=600.0)
        if choice is Next.HAND_OVER:
            break
        if choice is Next.FILL:
            progress = Progress(
                prompt_tokens=prompt, output_tokens=full(progress, block) - prompt, interval_s=interval_s
            )
        took = pause_s(progress, covered, road)
        covered, rounds, now = progress.tokens, rounds + 1, progress.output_tokens + took / interval_s
    assert rounds <= MAX_ROUNDS
    assert pause_s(progress, covered, road) <= first + road.cost.per_token_s * 2
