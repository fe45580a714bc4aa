"""Who reads next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllm.agent.store.queue import LoadingQueue


def test_goes_by_priority_and_then_by_arrival() -> None:
    queue: LoadingQueue[str] = LoadingQueue()
    for item, priority in (("prefetch", 2), ("first", 0), ("prewarm", 1), ("second", 0)):
        queue.put(item, priority)
    assert [queue.pop() for _ in range(5)] == ["first", "second", "prewarm", "prefetch", None]


def test_one_that_is_raised_keeps_its_place_among_equals() -> None:
    queue: LoadingQueue[str] = LoadingQueue()
    queue.put("early", 2)
    queue.put("late", 0)
    queue.raise_to("early", 0)
    queue.raise_to("late", 2)  # nobody is lowered
    assert [queue.pop(), queue.pop()] == ["early", "late"]


def test_one_that_is_removed_is_not_served_and_one_that_does_not_wait_is_no_error() -> None:
    queue: LoadingQueue[str] = LoadingQueue()
    queue.put("a", 0)
    queue.remove("b")
    queue.remove("a")
    assert queue.pop() is None


@given(st.lists(st.integers(0, 3)))
def test_nobody_is_lost_and_nobody_overtakes_an_equal(priorities: list[int]) -> None:
    queue: LoadingQueue[int] = LoadingQueue()
    for number, priority in enumerate(priorities):
        queue.put(number, priority)
    served = [queue.pop() for _ in priorities]
    assert served == sorted(range(len(priorities)), key=lambda number: (priorities[number], number))
