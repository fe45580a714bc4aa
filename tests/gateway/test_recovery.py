"""What a failure means for a request: it goes on elsewhere, or its client is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.errors import CapacityExceeded, EngineFailed, InvalidArgument, SllmError, StaleGeneration, Unavailable
from sllm.gateway.recovery import Trouble, Troubles, Verdict, trouble_of

FAIL, GO_ON, AFRESH = Verdict.FAIL, Verdict.GO_ON, Verdict.GO_ON_AFRESH


@pytest.mark.parametrize(
    ("error", "broken", "reached", "trouble"),
    [
        (InvalidArgument("no such grammar"), False, True, Trouble.REQUEST),
        (CapacityExceeded("the prompt never fits"), False, True, Trouble.REQUEST),
        (SllmError("a defect of ours"), False, True, Trouble.REQUEST),
        (Unavailable("draining"), False, True, Trouble.REFUSED),
        (StaleGeneration("another"), True, True, Trouble.REFUSED),
        (EngineFailed("CUDA error"), False, True, Trouble.DIED),
        (Unavailable("connection reset"), True, True, Trouble.DIED),
        (InvalidArgument("another protocol"), True, True, Trouble.DIED),
        (Unavailable("connection refused"), True, False, Trouble.UNREACHED),
    ],
)
def test_what_a_failure_says(error: SllmError, broken: bool, reached: bool, trouble: Trouble) -> None:
    assert trouble_of(error, broken=broken, reached=reached) is trouble


def test_a_request_that_is_wrong_fails_at_once() -> None:
    assert Troubles().add(Trouble.REQUEST, 5) is FAIL


def test_two_replicas_at_most_die_with_a_request_that_gets_nowhere() -> None:
    troubles = Troubles()
    assert troubles.add(Trouble.DIED, 0) is AFRESH
    assert troubles.add(Trouble.DIED, 0) is FAIL


def test_one_that_died_behind_new_tokens_did_not_die_of_it_for_all_we_know() -> None:
    troubles = Troubles()
    assert troubles.add(Trouble.DIED, 50) is AFRESH
    assert troubles.add(Trouble.DIED, 50) is AFRESH, "two may die at once"
    assert troubles.add(Trouble.DIED, 50) is FAIL


def test_a_request_that_gets_on_may_lose_any_number() -> None:
    troubles = Troubles()
    assert [troubles.add(Trouble.DIED, tokens) for tokens in range(1, 100)] == [AFRESH] * 99


def test_who_was_turned_away_is_sent_on_three_times_within_its_time() -> None:
    troubles = Troubles()
    assert [troubles.add(Trouble.REFUSED, 0) for _ in range(4)] == [GO_ON] * 3 + [FAIL]
    assert [troubles.add(Trouble.REFUSED, 7) for _ in range(5)] == [AFRESH] + [GO_ON] * 3 + [FAIL]


def test_one_whose_replica_stops_in_the_middle_has_all_the_time_again() -> None:
    troubles = Troubles()
    assert troubles.add(Trouble.REFUSED, 7) is AFRESH
    assert troubles.add(Trouble.REFUSED, 7) is GO_ON


def test_replicas_that_are_gone_already_count_for_nothing() -> None:
    troubles = Troubles()
    assert troubles.add(Trouble.DIED, 0) is AFRESH
    assert {troubles.add(Trouble.UNREACHED, 0) for _ in range(100)} == {GO_ON}
    assert troubles.add(Trouble.DIED, 0) is FAIL


@given(st.lists(st.tuples(st.sampled_from(Trouble), st.integers(0, 2))))
def test_whatever_happens_it_fails_with_the_second_death_in_a_row(history: list[tuple[Trouble, int]]) -> None:
    troubles, tokens, deaths = Troubles(), 0, 0
    for trouble, more in history:
        tokens += more
        deaths = 0 if more else deaths + (trouble is Trouble.DIED)
        verdict = troubles.add(trouble, tokens)
        assert (deaths < 2) or verdict is FAIL
        if verdict is FAIL:
            return
