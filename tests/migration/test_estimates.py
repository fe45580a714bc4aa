"""What is learnt: the cost of recomputing (paper §5.2), and how long requests run on."""

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.migration import RecomputeCost
from sllm.migration.estimate import RecomputeEstimate, predicted_s, updated
from sllm.migration.length import ENOUGH, KEPT, Lengths


def learnt(a: float, b: float, *, noise: float = 0.0, count: int = 50, seed: int = 0) -> RecomputeEstimate:
    estimate, generator = RecomputeEstimate(), random.Random(seed)
    for _ in range(count):
        tokens = generator.randrange(10, 3000)
        estimate.observe(tokens, (a * tokens + b) * (1 + generator.uniform(-noise, noise)))
    return estimate


def test_nothing_is_known_at_first() -> None:
    assert RecomputeEstimate().cost == RecomputeCost()
    assert RecomputeEstimate().error is None


def test_a_line_is_learnt_exactly() -> None:
    cost = learnt(0.0005, 0.01).cost
    assert (cost.per_token_s, cost.fixed_s) == (pytest.approx(0.0005), pytest.approx(0.01))
    assert cost.observations == 50


def test_the_median_error_after_some_observations_is_within_ten_percent_at_that_much_noise() -> None:
    error = learnt(0.0005, 0.01, noise=0.1).error
    assert error is not None
    assert error[0] <= 0.10
    assert error[1] <= 0.25


def test_one_round_behind_somebodys_long_prompt_does_not_spoil_it() -> None:
    estimate = learnt(0.0005, 0.01)
    before = predicted_s(estimate.cost, 1000)
    estimate.observe(1000, 60.0)
    assert predicted_s(estimate.cost, 1000) <= 1.5 * before


def test_a_change_is_followed() -> None:
    estimate, generator = learnt(0.0005, 0.01), random.Random(1)
    for _ in range(100):
        tokens = generator.randrange(10, 3000)
        estimate.observe(tokens, 0.001 * tokens + 0.01)
    assert estimate.cost.per_token_s == pytest.approx(0.001, rel=0.1)


def test_rounds_of_one_size_say_nothing_of_the_fixed_part() -> None:
    estimate = RecomputeEstimate()
    for _ in range(10):
        estimate.observe(100, 0.05)
    assert estimate.cost.fixed_s == 0.0
    assert predicted_s(estimate.cost, 100) == pytest.approx(0.05)


def test_what_needed_no_work_or_no_time_is_no_observation() -> None:
    estimate = RecomputeEstimate()
    estimate.observe(0, 0.5)
    estimate.observe(100, 0.0)
    assert estimate.cost.observations == 0


def test_small_rounds_are_predicted_as_well_as_large_ones() -> None:
    estimate, generator, wrong = RecomputeEstimate(), random.Random(2), []
    for number in range(200):
        tokens = generator.choice([generator.randrange(4, 60), generator.randrange(300, 2500)])
        true_s = 0.0008 * tokens + 0.02
        if number >= 20 and tokens < 60:
            wrong.append(abs(predicted_s(estimate.cost, tokens) - true_s) / true_s)
        estimate.observe(tokens, true_s * (1 + generator.uniform(-0.2, 0.2)))
    assert statistics.median(wrong) <= 0.1


def test_rounds_that_are_much_alike_do_not_make_long_ones_look_free() -> None:
    estimate, generator = RecomputeEstimate(), random.Random(3)
    for _ in range(50):
        estimate.observe(generator.randrange(95, 106), 0.1 * (1 + generator.uniform(-0.2, 0.2)))
    assert predicted_s(estimate.cost, 2000) >= 1.0


def test_a_migration_learns_the_part_that_its_round_tells_of() -> None:
    known = RecomputeCost(per_token_s=0.001, fixed_s=0.01, observations=20)
    large, small = updated(known, 1000, 1.5), updated(known, 2, 0.015)
    assert large.per_token_s == pytest.approx(0.0015, rel=0.01)
    assert large.fixed_s == pytest.approx(0.01, rel=0.01)
    assert small.per_token_s == pytest.approx(0.001, rel=0.1)
    assert small.fixed_s == pytest.approx(0.013, rel=0.05)
    assert updated(known, 0, 0.5) == known


def test_after_one_round_a_migration_has_a_guess_of_both_parts() -> None:
    cost = updated(RecomputeCost(), 484, 0.5)
    assert (cost.per_token_s, cost.fixed_s, cost.observations) == (pytest.approx(0.001), pytest.approx(0.016), 1)


@settings(deadline=None)
@given(
    first=st.tuples(st.integers(1, 5000), st.floats(1e-4, 10)),
    later=st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-4, 10)), max_size=8),
)
def test_whatever_was_measured_recomputing_is_never_free(
    first: tuple[int, float], later: list[tuple[int, float]]
) -> None:
    cost = updated(RecomputeCost(), *first)
    estimate = RecomputeEstimate()
    estimate.observe(*first)
    for tokens, seconds in later:
        before, cost = cost, updated(cost, tokens, seconds)
        assert before.per_token_s / 2 <= cost.per_token_s * 1.001
        assert cost.per_token_s <= before.per_token_s * 2.001
        estimate.observe(tokens, seconds)
        assert estimate.cost.per_token_s > 0
        assert estimate.cost.fixed_s >= 0


def test_a_request_is_expected_to_end_as_longer_ones_did() -> None:
    lengths = Lengths()
    for length in (10, 20, 100, 110, 120, 130, 140):
        lengths.finished(length)
    assert lengths.left(50, 0) == pytest.approx(120 - 50)
    assert lengths.left(50, 60) == 10, "its own limit bounds it"


def test_without_longer_ones_its_limit_is_all_that_is_known() -> None:
    lengths = Lengths()
    assert lengths.left(50, 200) == 150
    assert lengths.left(50, 0) is None
    for _ in range(ENOUGH - 1):
        lengths.finished(100)
    assert lengths.left(50, 200) == 150


def test_old_lengths_are_forgotten() -> None:
    lengths = Lengths()
    for _ in range(KEPT):
        lengths.finished(1000)
    for _ in range(KEPT):
        lengths.finished(100)
    assert lengths.left(0, 0) == 100
