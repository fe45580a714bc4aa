"""What is evicted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllm.loader.tiers import Held, make_room, worth

NEW, OLD, DEAR, CHEAP, POPULAR, RARE = range(6)


def held(id: int, **changes: float | bool) -> Held:  # noqa: A002 - it is one
    fields = {"size_bytes": 10, "reload_s": 1.0, "uses": 1, "last_used": 0.0} | changes
    return Held(id=id, **fields)  # type: ignore[arg-type]


def test_evicts_nothing_while_there_is_room() -> None:
    assert make_room([held(1)], free_bytes=10, needed_bytes=10, now=0.0) == ()


def test_the_longest_unused_goes_first() -> None:
    copies = [held(NEW, last_used=9.0), held(OLD, last_used=1.0)]
    assert make_room(copies, free_bytes=0, needed_bytes=5, now=10.0) == (OLD,)


def test_what_is_dear_to_read_again_stays() -> None:
    copies = [held(DEAR, reload_s=60.0), held(CHEAP, reload_s=1.0, last_used=5.0)]
    assert make_room(copies, free_bytes=0, needed_bytes=5, now=10.0) == (CHEAP,)


def test_what_is_often_used_stays() -> None:
    copies = [held(POPULAR, uses=100), held(RARE, last_used=5.0)]
    assert make_room(copies, free_bytes=0, needed_bytes=5, now=10.0) == (RARE,)


def test_pinned_copies_stay_even_if_there_is_no_room_then() -> None:
    assert make_room([held(1, pinned=True)], free_bytes=0, needed_bytes=1, now=0.0) is None


copies = st.lists(
    st.builds(
        Held,
        id=st.integers(),
        size_bytes=st.integers(0, 1000),
        reload_s=st.floats(0, 100),
        uses=st.integers(0, 10),
        last_used=st.floats(0, 100),
        pinned=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda copy: copy.id,
)


@given(copies=copies, free=st.integers(0, 500), needed=st.integers(0, 5000))
def test_frees_enough_never_what_is_pinned_and_nothing_in_vain(copies: list[Held], free: int, needed: int) -> None:
    victims = make_room(copies, free_bytes=free, needed_bytes=needed, now=100.0)
    loose = {copy.id: copy for copy in copies if not copy.pinned}
    if victims is None:
        assert free + sum(copy.size_bytes for copy in loose.values()) < needed
        return
    assert set(victims) <= loose.keys()
    freed = free + sum(loose[victim].size_bytes for victim in victims)
    assert freed >= needed
    assert all(freed - loose[victim].size_bytes < needed for victim in victims)


@given(copies=copies, needed=st.integers(0, 5000), data=st.data())
def test_the_choice_does_not_depend_on_the_order_given(copies: list[Held], needed: int, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(copies))
    assert make_room(copies, free_bytes=0, needed_bytes=needed, now=100.0) == make_room(
        shuffled, free_bytes=0, needed_bytes=needed, now=100.0
    )


@given(copies=copies)
def test_of_equal_sizes_only_the_least_worthy_go(copies: list[Held]) -> None:
    same = [held(copy.id, reload_s=copy.reload_s, last_used=copy.last_used) for copy in copies]
    victims = make_room(same, free_bytes=0, needed_bytes=20, now=100.0)
    if victims is not None:
        kept = [worth(copy, 100.0) for copy in same if copy.id not in victims]
        gone = [worth(copy, 100.0) for copy in same if copy.id in victims]
        assert max(gone) <= min(kept, default=max(gone))
