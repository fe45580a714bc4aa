"""The source's machine beside a destination that takes a known time: how many rounds it runs, and what pause is left.

A model, not a measurement: it computes nothing but time, and needs none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest

from sllm.core.migration import RecomputeCost, Round
from sllm.migration import source
from sllm.migration.estimate import predicted_s
from sllm.migration.policy import Progress, cached
from sllm.migration.source import Advanced, Begin, Event, HandOver, Phase, Recompute, RoundEnded

ROUND_TRIP_S = 0.001
UNKNOWN = RecomputeCost()


@dataclass(frozen=True)
class Destination:
    """`cost` is what a recompute really takes there, `interval_s` what the source takes for a token meanwhile."""

    cost: RecomputeCost
    interval_s: float
    block: int = 16

    def missing(self, tokens: int, covered: int) -> int:
        return tokens - cached(min(covered, tokens - 1), self.block)


@dataclass(frozen=True)
class Outcome:
    rounds: list[int]  # tokens computed in each
    pause_s: float
    predicted_s: float


SMALL = Destination(RecomputeCost(per_token_s=0.00005, fixed_s=0.006), interval_s=0.004)
MEDIUM = Destination(RecomputeCost(per_token_s=0.0008, fixed_s=0.012), interval_s=0.0155)
ACCELERATED = Destination(RecomputeCost(per_token_s=0.00004, fixed_s=0.015), interval_s=0.015)


def moved(there: Destination, output: int, *, known: RecomputeCost, prompt: int = 64) -> Outcome:
    """Move a request that has had `output` tokens, and goes on while rounds are computed."""
    machine = source.new(cost=known, block_size=there.block, deadline=600.0)
    now, covered, rounds = 0.0, 0, []

    def progress() -> Progress:
        made = output + int(now / there.interval_s + 1e-6)
        return Progress(prompt_tokens=prompt, output_tokens=made, interval_s=there.interval_s)

    event: Event = Begin(progress=progress())
    while True:
        machine, effects = source.step(machine, event, now)
        missing = there.missing(progress().tokens, covered)
        took = predicted_s(there.cost, missing)
        for effect in effects:
            if isinstance(effect, HandOver):
                return Outcome(rounds, took + ROUND_TRIP_S, effect.predicted_pause_s)
        if machine.phase is not Phase.ROUND:  # it waits for tokens, and one comes
            now = (progress().output_tokens - output + 1) * there.interval_s
            event = Advanced(progress=progress())
            continue
        assert Recompute(tokens=progress().tokens) in effects
        rounds.append(missing)
        covered, now = progress().tokens, now + took + ROUND_TRIP_S
        done = Round(tokens=covered, cached_tokens=covered - missing, seconds=took)
        event = RoundEnded(round=done, progress=progress(), round_trip_s=ROUND_TRIP_S)


@pytest.mark.parametrize("there", [SMALL, MEDIUM, ACCELERATED])
@pytest.mark.parametrize("output", [100, 500, 1000, 2000])
def test_few_rounds_leave_a_pause_of_half_an_interval_and_a_step(there: Destination, output: int) -> None:
    outcome = moved(there, output, known=replace(there.cost, observations=20))
    assert len(outcome.rounds) <= 4
    step_s = there.cost.fixed_s + there.cost.per_token_s
    assert outcome.pause_s <= there.interval_s / 2 + step_s, "hardly anything of a block is computed again"
    assert outcome.predicted_s == pytest.approx(outcome.pause_s, rel=0.25)


@pytest.mark.parametrize("there", [SMALL, MEDIUM, ACCELERATED])
def test_the_first_migration_of_all_is_nearly_as_good(there: Destination) -> None:
    outcome = moved(there, 1000, known=UNKNOWN)
    assert outcome.rounds
    assert outcome.pause_s <= 4 * there.interval_s + there.cost.fixed_s


@pytest.mark.parametrize("there", [SMALL, MEDIUM, ACCELERATED])
def test_a_pause_is_a_hundredth_of_a_restart_at_a_thousand_tokens(there: Destination) -> None:
    assert moved(there, 1000, known=UNKNOWN).pause_s <= 1000 * there.interval_s / 100


def test_the_gap_shrinks_geometrically() -> None:
    fast_decoder = Destination(RecomputeCost(per_token_s=0.001, fixed_s=0.0), interval_s=0.004, block=1)
    rounds = moved(fast_decoder, 4000, known=UNKNOWN).rounds
    assert len(rounds) >= 4
    assert all(later <= earlier / 3 for earlier, later in itertools.pairwise(rounds))


def test_rounds_at_a_destination_that_is_no_faster_than_decoding_are_not_run_once_that_is_known() -> None:
    slow = Destination(RecomputeCost(per_token_s=0.01, fixed_s=0.0), interval_s=0.01)
    known = RecomputeCost(per_token_s=0.01, observations=20)
    assert moved(slow, 1000, known=known).rounds == []
    assert len(moved(slow, 1000, known=UNKNOWN).rounds) == 1


def test_after_a_small_round_a_long_request_is_not_handed_over_cold() -> None:
    """An order learns from one request for the next: a small round that was fast by chance must not mislead it."""
    known = replace(MEDIUM.cost, observations=20)
    machine = source.new(cost=known, block_size=16, deadline=60.0)
    progress = Progress(prompt_tokens=64, output_tokens=400, interval_s=MEDIUM.interval_s)
    machine, _ = source.step(machine, Begin(progress=progress), 0.0)
    fast = RoundEnded(round=Round(tokens=464, cached_tokens=456, seconds=0.001), progress=progress)
    machine, _ = source.step(machine, fast, 0.0)
    assert moved(MEDIUM, 2000, known=machine.road.cost).rounds
