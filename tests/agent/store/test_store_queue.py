"""Who reads next, and who is interrupted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from sllm.agent.store.queue import LoadingQueue


def served(queue: LoadingQueue[str]) -> list[str]:
    """Return all that are there in the order in which they read to their ends."""
    order = []
    while (item := queue.first()) is not None:
        order.append(item)
        queue.remove(item)
    return order


def of(**items: int) -> LoadingQueue[str]:
    queue: LoadingQueue[str] = LoadingQueue()
    for item, priority in items.items():
        queue.put(item, priority)
    return queue


def test_goes_by_priority_and_then_by_arrival() -> None:
    assert served(of(prefetch=2, first=0, prewarm=1, second=0)) == ["first", "second", "prewarm", "prefetch"]


def test_one_that_is_raised_keeps_its_place_among_equals() -> None:
    queue = of(early=2, late=0)
    queue.raise_to("early", 0)
    queue.raise_to("late", 2)  # nobody is lowered
    assert served(queue) == ["early", "late"]


def test_one_that_is_removed_is_not_served_and_one_that_is_not_there_is_no_error() -> None:
    queue = of(a=0)
    queue.remove("b")
    queue.remove("a")
    assert queue.first() is None


def test_a_better_one_interrupts_who_reads_and_then_that_goes_on() -> None:
    queue = of(prefetch=2, other=2)
    assert queue.first() == "prefetch"
    queue.put("request", 0)
    assert served(queue) == ["request", "prefetch", "other"]


def test_an_equal_one_interrupts_nobody() -> None:
    queue = of(late=2, reads=1)
    assert queue.first() == "reads"
    queue.raise_to("late", 1)  # it came earlier
    assert served(queue) == ["reads", "late"]


def test_one_that_was_interrupted_goes_before_equals_that_have_not_begun() -> None:
    queue = of(earlier=2, interrupted=1)
    assert queue.first() == "interrupted"
    queue.put("request", 0)
    assert queue.first() == "request"
    queue.raise_to("earlier", 1)
    assert served(queue) == ["request", "interrupted", "earlier"]


def test_one_that_was_interrupted_and_is_raised_interrupts_a_worse_one_but_no_equal() -> None:
    queue = of(interrupted=2)
    assert queue.first() == "interrupted"
    queue.put("reads", 1)
    assert queue.first() == "reads"
    queue.raise_to("interrupted", 1)
    assert queue.first() == "reads"
    queue.raise_to("interrupted", 0)
    assert queue.first() == "interrupted"


def test_one_that_needs_what_others_hold_lets_them_go_first_and_goes_before_those_who_came_later() -> None:
    queue = of(prefetch=2)
    assert queue.first() == "prefetch"
    queue.put("prewarm", 1)
    assert queue.first() == "prewarm"
    queue.put("request", 0)
    queue.put("later", 0)
    assert queue.first() == "request"
    assert queue.give_way("request")
    assert served(queue) == ["prefetch", "prewarm", "request", "later"]


def test_one_that_needs_memory_which_nobody_holds_does_not_wait() -> None:
    queue = of(request=0, later=0)
    assert queue.first() == "request"
    assert not queue.give_way("request")
    assert not queue.give_way("nobody")
    assert queue.first() == "request"


@given(st.lists(st.integers(0, 3)))
def test_nobody_is_lost_and_nobody_overtakes_an_equal(priorities: list[int]) -> None:
    queue: LoadingQueue[int] = LoadingQueue()
    for number, priority in enumerate(priorities):
        queue.put(number, priority)
    order = []
    while (item := queue.first()) is not None:
        order.append(item)
        queue.remove(item)
    assert order == sorted(range(len(priorities)), key=lambda number: (priorities[number], number))


class Arrivals(RuleBasedStateMachine):
    """Any order of arrivals, raises, ends, cancels, and turns that are given up for want of memory."""

    there = Bundle("there")

    def __init__(self) -> None:
        super().__init__()
        self.queue: LoadingQueue[object] = LoadingQueue()
        self.priorities: dict[object, int] = {}
        self.begun: set[object] = set()
        self.reads: object | None = None

    @rule(target=there, priority=st.integers(0, 2))
    def arrive(self, priority: int) -> object:
        item = object()
        self.queue.put(item, priority)
        self.priorities[item] = priority
        return item

    @rule(item=there, priority=st.integers(0, 2))
    def go_up(self, item: object, priority: int) -> None:
        self.queue.raise_to(item, priority)
        self._raise(item, priority)

    @rule(item=consumes(there))
    def leave(self, item: object) -> None:
        self._remove(item)

    @rule()
    def end(self) -> None:
        self._remove(self.reads)

    @rule()
    def want_memory(self) -> None:
        """It asks again at each of its turns, until nobody else has begun."""
        for _ in range(len(self.priorities) + 1):
            reads = self.queue.first()
            if reads is None or not self.queue.give_way(reads):
                assert self.begun <= {reads}
                return
            self.begun -= {reads}
            for other in self.begun:
                self._raise(other, self.priorities[reads])
            self.reads = None
            if (first := self.queue.first()) is not None:
                self.begun.add(first)
        raise AssertionError("nobody reads: each waits for another")

    @invariant()
    def whoever_reads_is_the_most_urgent_and_has_interrupted_no_equal(self) -> None:
        before, self.reads = self.reads, self.queue.first()
        assert (self.reads is None) == (not self.priorities)
        if self.reads is None:
            return
        self.begun.add(self.reads)
        assert self.priorities[self.reads] == min(self.priorities.values())
        if before in self.priorities and self.reads is not before:
            assert self.priorities[self.reads] < self.priorities[before]

    def teardown(self) -> None:
        left = set(self.priorities)
        while (item := self.queue.first()) is not None:
            self.queue.remove(item)
            left.remove(item)
        assert not left, "some would wait for ever"

    def _raise(self, item: object, priority: int) -> None:
        if item in self.priorities:
            self.priorities[item] = min(self.priorities[item], priority)

    def _remove(self, item: object) -> None:
        self.queue.remove(item)
        self.priorities.pop(item, None)
        self.begun.discard(item)


TestArrivals = Arrivals.TestCase
