"""The source of a migration: every rule of the paper is a row here (§5.2 the rounds, §5.3 what dies meanwhile)."""

import pytest

from sllm.core.migration import MigrationState, RecomputeCost, Round
from sllm.errors import Unavailable
from sllm.migration import source
from sllm.migration.policy import MAX_ROUNDS, Progress
from sllm.migration.source import (
    TRANSITIONS,
    Begin,
    CalledOff,
    Effect,
    Event,
    HandOver,
    Phase,
    Recompute,
    Report,
    RequestEnded,
    RoundEnded,
    RoundFailed,
    Source,
    StopRecompute,
    TimeOver,
)

KNOWN = RecomputeCost(per_token_s=0.001, fixed_s=0.002, observations=10)
DEADLINE = 60.0
LOST = Unavailable("it died")


def at(output: int, *, interval_s: float = 0.02) -> Progress:
    return Progress(prompt_tokens=100, output_tokens=output, interval_s=interval_s)


def new(cost: RecomputeCost = KNOWN) -> Source:
    return source.new(cost=cost, block_size=16, deadline=DEADLINE)


def stepped(state: Source, event: Event, now: float = 0.0) -> tuple[Source, list[Effect]]:
    after, effects = source.step(state, event, now)
    return after, list(effects)


def in_round(output: int = 400) -> Source:
    return stepped(new(), Begin(progress=at(output)))[0]


def answer(state: Source, output: int, *, seconds: float = 0.1) -> RoundEnded:
    done = Round(tokens=state.asked_tokens, cached_tokens=state.covered_tokens // 16 * 16, seconds=seconds)
    return RoundEnded(round=done, progress=at(output), round_trip_s=0.001)


def test_the_source_sends_all_tokens_so_far_and_goes_on_decoding_paper_5_2() -> None:
    state, effects = stepped(new(), Begin(progress=at(400)))
    assert effects == [Report(state=MigrationState.ROUNDS), Recompute(tokens=500)]
    assert state.phase is Phase.ROUND


def test_a_later_round_sends_what_was_generated_meanwhile_until_the_gap_is_small_paper_5_2() -> None:
    state = in_round(1000)
    state, effects = stepped(state, answer(state, 1055, seconds=1.1))
    assert [e for e in effects if isinstance(e, Recompute)] == [Recompute(tokens=1155)]
    state, effects = stepped(state, answer(state, 1058, seconds=0.06))
    assert [type(e) for e in effects] == [Report, HandOver, Report]
    assert (state.phase, state.outcome) == (Phase.OVER, MigrationState.MOVED)


def test_the_handover_says_what_pause_it_expects() -> None:
    state = in_round(412)  # 512 tokens: whole blocks
    _, effects = stepped(state, answer(state, 414, seconds=0.512))
    handover = next(e for e in effects if isinstance(e, HandOver))
    assert handover.predicted_pause_s == pytest.approx(0.002 + 2 * (0.510 / 512) + 0.001, rel=0.05)


def test_no_round_is_run_that_does_not_pay() -> None:
    short = Progress(prompt_tokens=5, output_tokens=3, interval_s=0.02)
    _, effects = stepped(new(), Begin(progress=short))
    assert isinstance(effects[0], HandOver), "shorter than a block: nothing of it would be kept there"
    cheap = RecomputeCost(per_token_s=1e-6, fixed_s=1e-3, observations=10)
    _, effects = stepped(new(cheap), Begin(progress=at(400)))
    assert isinstance(effects[0], HandOver), "the pause is within the request's own rhythm"


def test_while_nothing_is_known_one_round_tells() -> None:
    _, effects = stepped(new(RecomputeCost()), Begin(progress=at(400)))
    assert effects[-1] == Recompute(tokens=500)


def test_rounds_that_do_not_converge_are_not_run_for_ever() -> None:
    state, output, rounds = in_round(400), 400, 1
    while state.phase is Phase.ROUND:
        output += 400  # it decodes as fast as the destination recomputes
        state, effects = stepped(state, answer(state, output, seconds=1.0))
        rounds += any(isinstance(e, Recompute) for e in effects)
    assert rounds <= MAX_ROUNDS
    assert state.outcome is MigrationState.MOVED


@pytest.mark.parametrize("state", [new(), in_round()], ids=["waiting", "in a round"])
@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (RequestEnded(), MigrationState.FINISHED),
        (CalledOff(), MigrationState.CANCELLED),
        (TimeOver(), MigrationState.CANCELLED),
    ],
)
def test_it_may_end_without_having_moved_and_the_destination_is_told_to_stop_paper_5_3(
    state: Source, event: Event, outcome: MigrationState
) -> None:
    after, effects = stepped(state, event)
    assert (after.phase, after.outcome) == (Phase.OVER, outcome)
    assert (StopRecompute() in effects) == (state.phase is Phase.ROUND)
    assert effects[-1] == Report(state=outcome)


def test_a_destination_that_dies_in_a_round_leaves_the_source_as_it_was_paper_5_3() -> None:
    after, effects = stepped(in_round(), RoundFailed(error=LOST))
    assert after.outcome is MigrationState.FAILED
    assert effects == [Report(state=MigrationState.FAILED, error=LOST)]


@pytest.mark.parametrize("event", [RequestEnded(), CalledOff(), TimeOver(), RoundFailed(error=LOST)])
def test_after_the_handover_nothing_changes_what_happened_paper_5_3(event: Event) -> None:
    state = in_round(412)
    over, _ = stepped(state, answer(state, 413, seconds=0.001))
    assert over.outcome is MigrationState.MOVED
    assert stepped(over, event) == (over, [])


def test_after_the_deadline_no_round_is_begun() -> None:
    state = in_round(1000)
    _, effects = stepped(state, answer(state, 1500, seconds=1.0), now=DEADLINE)
    assert not any(isinstance(e, Recompute) for e in effects)


def test_the_table_has_every_event_of_every_phase_that_is_not_over() -> None:
    begun = {event for phase, event in TRANSITIONS if phase is Phase.ROUND}
    waiting = {event for phase, event in TRANSITIONS if phase is Phase.WAITING}
    assert begun == {RoundEnded, RoundFailed, RequestEnded, CalledOff, TimeOver}
    assert waiting == {Begin, RequestEnded, CalledOff, TimeOver}
    assert not any(phase is Phase.OVER for phase, _ in TRANSITIONS)
