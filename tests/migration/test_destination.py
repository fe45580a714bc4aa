"""The destination: rounds come and go, and leave nothing behind (paper §5.3)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.ids import RequestId
from sllm.migration import destination
from sllm.migration.destination import (
    MAX_AT_ONCE,
    Answer,
    Arrived,
    Asked,
    Closing,
    Compute,
    Computed,
    Destination,
    Drop,
    Effect,
    Event,
    Refuse,
)

A, B = RequestId("req-a"), RequestId("req-b")


def played(*events: Event) -> tuple[Destination, list[Effect]]:
    state, effects = Destination(), []
    for event in events:
        state, more = destination.step(state, event)
        effects += more
    return state, effects


def test_a_round_is_computed_and_answered() -> None:
    state, effects = played(Asked(request=A, key=1), Computed(key=1))
    assert effects == [Compute(key=1), Answer(key=1)]
    assert state == Destination()


def test_a_newer_round_of_a_request_replaces_the_older() -> None:
    state, effects = played(Asked(request=A, key=1), Asked(request=A, key=2))
    assert effects == [Compute(key=1), Drop(key=1), Compute(key=2)]
    assert state.rounds == ((A, 2),)


def test_a_source_that_dies_leaves_nothing_at_the_destination_paper_5_3() -> None:
    state, effects = played(Asked(request=A, key=1), Asked(request=B, key=2), Arrived(request=A))
    assert effects[-1] == Drop(key=1)
    assert state.rounds == ((B, 2),)


def test_what_the_engine_finishes_for_nobody_is_not_answered() -> None:
    _, effects = played(Asked(request=A, key=1), Arrived(request=A), Computed(key=1))
    assert effects == [Compute(key=1), Drop(key=1)]


def test_too_many_at_once_are_refused() -> None:
    many = [Asked(request=RequestId(f"req-{n}"), key=n) for n in range(MAX_AT_ONCE)]
    state, effects = played(*many, Asked(request=A, key=99))
    assert effects[-1] == Refuse(key=99)
    assert len(state.rounds) == MAX_AT_ONCE


EVENTS = st.lists(
    st.one_of(
        st.builds(Arrived, request=st.sampled_from([A, B])),
        st.builds(Computed, key=st.integers(0, 20)),
        st.builds(Closing),
        st.sampled_from([A, B]),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(EVENTS)
def test_every_round_is_ended_exactly_once(events: list[Event | RequestId]) -> None:
    keys = iter(range(100))
    asked = [Asked(request=e, key=next(keys)) if isinstance(e, str) else e for e in events]
    _, effects = played(*asked, Closing())
    begun = [e.key for e in effects if isinstance(e, Compute)]
    ended = [e.key for e in effects if isinstance(e, Answer | Drop)]
    assert sorted(begun) == sorted(ended)
