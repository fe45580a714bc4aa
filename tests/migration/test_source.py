"""The source of a migration: every rule of the paper is a row here (§5.2 the rounds, §5.3 what dies meanwhile)."""

import pytest

from sllm.core.migration import MigrationState, RecomputeCost, Round
from sllm.errors import Unavailable
from sllm.migration import source
from sllm.migration.policy import MAX_ROUNDS, Progress
from sllm.migration.source import (
    TRANSITIONS,
    Advanced,
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
    Waited,
    Watch,
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


def answer(state: Source, output: int, *, seconds: float = 0.1, interval_s: float = 0.02) -> RoundEnded:
    done = Round(tokens=state.asked_tokens, cached_tokens=state.covered_tokens // 16 * 16, seconds=seconds)
    return RoundEnded(round=done, progress=at(output, interval_s=interval_s), round_trip_s=0.001)


def test_the_source_sends_all_tokens_so_far_and_goes_on_decoding_paper_5_2() -> None:
    state, effects = stepped(new(), Begin(progress=at(400)))
    assert effects == [Report(state=MigrationState.ROUNDS), Recompute(tokens=500)]
    assert state.phase is Phase.ROUND


def test_a_later_round_sends_what_was_generated_meanwhile_paper_5_2() -> None:
    state = in_round(1000)
    state, effects = stepped(state, answer(state, 1255, seconds=1.1))
    assert [e for e in effects if isinstance(e, Recompute)] == [Recompute(tokens=1355)]


def filling() -> Source:
    state = in_round(1000)
    return stepped(state, answer(state, 1006, seconds=1.1, interval_s=0.01))[0]


def test_the_last_round_is_sent_just_as_a_block_has_been_filled_and_the_handover_comes_behind_a_token() -> None:
    state = in_round(1000)
    state, effects = stepped(state, answer(state, 1006, seconds=1.1, interval_s=0.01))
    assert effects[-1] == Watch(until=pytest.approx(2 * 14 * 0.01))
    assert (state.phase, state.awaited_tokens) == (Phase.FILLING, 1120)
    assert stepped(state, Advanced(progress=at(1019))) == (state, [])
    state, effects = stepped(state, Advanced(progress=at(1020)))
    assert (state.phase, effects) == (Phase.ROUND, [Recompute(tokens=1120)])
    state, effects = stepped(state, answer(state, 1021, seconds=0.02, interval_s=0.01))
    assert (state.phase, effects[-1]) == (Phase.LEAVING, Watch(until=pytest.approx(2 * 0.01)))
    assert stepped(state, Advanced(progress=at(1021))) == (state, []), "another request's step"
    state, effects = stepped(state, Advanced(progress=at(1022)))
    assert [type(e) for e in effects] == [HandOver, Report]
    assert (state.phase, state.outcome) == (Phase.OVER, MigrationState.MOVED)


def leaving() -> Source:
    state = in_round(412)  # 512 tokens: whole blocks
    return stepped(state, answer(state, 413, seconds=0.001))[0]


@pytest.mark.parametrize("state", [filling(), leaving()], ids=["filling", "leaving"])
def test_a_source_that_makes_no_tokens_is_not_waited_for(state: Source) -> None:
    after, effects = stepped(state, Waited(progress=at(1007)))
    assert after.outcome is MigrationState.MOVED
    assert isinstance(effects[0], HandOver)


def test_a_request_without_a_rhythm_is_handed_over_at_once() -> None:
    short = Progress(prompt_tokens=5, output_tokens=0, interval_s=0.0)
    assert stepped(new(), Begin(progress=short))[0].outcome is MigrationState.MOVED


def test_the_handover_says_what_pause_it_expects() -> None:
    state = in_round(412)
    state, _ = stepped(state, answer(state, 413, seconds=0.512))
    assert state.phase is Phase.LEAVING
    _, effects = stepped(state, Advanced(progress=at(414)))
    handover = next(e for e in effects if isinstance(e, HandOver))
    assert handover.predicted_pause_s == pytest.approx(0.002 + 2 * (0.510 / 512) + 0.001, rel=0.05)


def test_no_round_is_run_that_does_not_pay() -> None:
    short = Progress(prompt_tokens=5, output_tokens=3, interval_s=0.02)
    state, _ = stepped(new(), Begin(progress=short))
    assert state.phase is Phase.LEAVING, "its pause is within the request's own rhythm"
    cheap = RecomputeCost(per_token_s=1e-6, fixed_s=1e-3, observations=10)
    state, effects = stepped(new(cheap), Begin(progress=at(400)))
    assert state.phase is Phase.LEAVING, "the pause is within the request's own rhythm"
    assert not any(isinstance(effect, Recompute) for effect in effects)


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
    state, _ = stepped(state, Advanced(progress=at(output + 1)))
    assert state.outcome is MigrationState.MOVED


@pytest.mark.parametrize(
    "state", [new(), in_round(), filling(), leaving()], ids=["waiting", "in a round", "filling", "leaving"]
)
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


@pytest.mark.parametrize(
    "event", [RequestEnded(), CalledOff(), TimeOver(), RoundFailed(error=LOST), Waited(progress=at(415))]
)
def test_after_the_handover_nothing_changes_what_happened_paper_5_3(event: Event) -> None:
    over, _ = stepped(leaving(), Advanced(progress=at(414)))
    assert over.outcome is MigrationState.MOVED
    assert stepped(over, event) == (over, [])


def test_after_the_deadline_no_round_is_begun() -> None:
    state = in_round(1000)
    _, effects = stepped(state, answer(state, 1500, seconds=1.0), now=DEADLINE)
    assert not any(isinstance(e, Recompute) for e in effects)


def test_the_table_has_every_event_of_every_phase_that_is_not_over() -> None:
    always = {RequestEnded, CalledOff, TimeOver}
    expected = {
        Phase.WAITING: {Begin} | always,
        Phase.ROUND: {RoundEnded, RoundFailed} | always,
        Phase.FILLING: {Advanced, Waited} | always,
        Phase.LEAVING: {Advanced, Waited} | always,
        Phase.OVER: set(),
    }
    assert {phase: {event for at, event in TRANSITIONS if at is phase} for phase in Phase} == expected
