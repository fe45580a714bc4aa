"""What is evicted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllm.loader.tiers import Held, make_room, worth


def held(digest: str, **changes: float | bool) -> Held:
    fields = {"size_bytes": 10, "reload_s": 1.0, "uses": 1, "last_used": 0.0} | changes
    return Held(digest=digest, **fields)  # type: ignore[arg-type]


def test_evicts_nothing_while_there_is_room() -> None:
    assert make_room([held("a")], free_bytes=10, needed_bytes=10, now=0.0).victims == ()


def test_the_longest_unused_goes_first() -> None:
    copies = [held("new", last_used=9.0), held("old", last_used=1.0)]
    assert make_room(copies, free_bytes=0, needed_bytes=5, now=10.0).victims == ("old",)


def test_what_is_dear_to_read_again_stays() -> None:
    copies = [held("dear", reload_s=60.0), held("cheap", reload_s=1.0, last_used=5.0)]
    assert make_room(copies, free_bytes=0, needed_bytes=5, now=10.0).victims == ("cheap",)


def test_what_is_often_used_stays() -> None:
    copies = [held("popular", uses=100), held("rare", last_used=5.0)]
    assert make_room(copies, free_bytes=0, needed_bytes=5, now=10.0).victims == ("rare",)


def test_pinned_copies_stay_even_if_there_is_no_room_then() -> None:
    assert make_room([held("a", pinned=True)], free_bytes=0, needed_bytes=1, now=0.0).victims is None


copies = st.lists(
    st.builds(
        Held,
        digest=st.uuids().map(str),
        size_bytes=st.integers(0, 1000),
        reload_s=st.floats(0, 100),
        uses=st.integers(0, 10),
        last_used=st.floats(0, 100),
        pinned=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda copy: copy.digest,
)


@given(copies=copies, free=st.integers(0, 500), needed=st.integers(0, 5000))
def test_frees_enough_never_what_is_pinned_and_nothing_in_vain(copies: list[Held], free: int, needed: int) -> None:
    victims = make_room(copies, free_bytes=free, needed_bytes=needed, now=100.0).victims
    loose = {copy.digest: copy for copy in copies if not copy.pinned}
    if victims is None:
        assert free + sum(copy.size_bytes for copy in loose.values()) < needed
        return
    assert set(victims) <= loose.keys()
    freed = free + sum(loose[digest].size_bytes for digest in victims)
    assert freed >= needed
    assert all(freed - loose[digest].size_bytes < needed for digest in victims)


@given(copies=copies, needed=st.integers(0, 5000), data=st.data())
def test_the_choice_does_not_depend_on_the_order_given(copies: list[Held], needed: int, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(copies))
    assert make_room(copies, free_bytes=0, needed_bytes=needed, now=100.0) == make_room(
        shuffled, free_bytes=0, needed_bytes=needed, now=100.0
    )


@given(copies=copies)
def test_of_equal_sizes_only_the_least_worthy_go(copies: list[Held]) -> None:
    same = [held(copy.digest, reload_s=copy.reload_s, last_used=copy.last_used) for copy in copies]
    victims = make_room(same, free_bytes=0, needed_bytes=20, now=100.0).victims
    if victims is not None:
        kept = [worth(copy, 100.0) for copy in same if copy.digest not in victims]
        gone = [worth(copy, 100.0) for copy in same if copy.digest in victims]
        assert max(gone) <= min(kept, default=max(gone))
