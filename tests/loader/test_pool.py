"""Pools of the library."""

from __future__ import annotations

import gc
import os
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from sllm.errors import CapacityExceeded, Conflict, InvalidArgument
from sllm.loader.memory.pool import Allocation, Pool, fresh

PAGE = 4096


def test_memory_is_given_back_when_the_last_view_is_gone() -> None:
    with Pool(4 * PAGE) as pool:
        made = pool.allocate(3 * PAGE)
        view = memoryview(made.buffer)[5:6]
        del made
        assert pool.used_bytes == 3 * PAGE
        del view
        assert pool.used_bytes == 0


def test_memory_is_given_back_by_a_load_that_failed_though_its_traceback_lives() -> None:
    with Pool(PAGE) as pool:
        made = pool.allocate(PAGE)
        made.release()
        again = pool.allocate(PAGE)
        made.release()
        del made
        assert pool.used_bytes == PAGE
        del again
        assert pool.used_bytes == 0


def test_a_pool_that_has_no_room_says_how_much_it_has() -> None:
    with Pool(4 * PAGE) as pool:
        held = pool.allocate(2 * PAGE)
        with pytest.raises(CapacityExceeded, match=f"{3 * PAGE} bytes .* {4 * PAGE}, {2 * PAGE} are free"):
            pool.allocate(3 * PAGE)
        assert pool.largest_bytes == 2 * PAGE
        del held


def test_a_piece_begins_at_a_page_and_is_as_long_as_asked() -> None:
    with Pool(8 * PAGE) as pool:
        pieces = [pool.allocate(size) for size in (1, PAGE + 1, 0)]
        assert [len(piece.buffer) for piece in pieces] == [1, PAGE + 1, 0]
        assert pool.used_bytes == 3 * PAGE
        memoryview(pieces[1].buffer).cast("B")[-1:] = b"\x01"


def test_a_closed_pool_gives_no_memory_but_leaves_what_it_gave() -> None:
    pool = Pool(PAGE)
    made = pool.allocate(PAGE)
    pool.close()
    with pytest.raises(Conflict, match="closed"):
        pool.allocate(1)
    gc.collect()
    memoryview(made.buffer).cast("B")[:1] = b"\x01"
    assert pool.used_bytes == PAGE


def test_the_memory_of_a_pool_is_present_from_the_start() -> None:
    before = resident_bytes()
    with Pool(64 << 20):
        assert resident_bytes() - before > 60 << 20


def test_more_memory_than_there_are_addresses_for_is_refused() -> None:
    with pytest.raises(CapacityExceeded):
        fresh(1 << 50)
    with pytest.raises(CapacityExceeded):
        Pool(1 << 50)


def test_threads_that_share_a_pool_never_share_memory() -> None:
    errors: list[str] = []

    def work(mark: int) -> None:
        for size in (PAGE, 3 * PAGE, 2 * PAGE) * 50:
            try:
                view = memoryview(pool.allocate(size).buffer).cast("B")
            except CapacityExceeded:
                continue
            view[:] = bytes([mark]) * size
            if bytes(view) != bytes([mark]) * size:
                errors.append(f"thread {mark} found another's bytes")

    with Pool(8 * PAGE) as pool:
        threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert pool.used_bytes == 0
        assert pool.largest_bytes == pool.size_bytes


class PoolMachine(RuleBasedStateMachine):
    """Whatever is allocated and let go in whatever order: every byte is free or in one piece."""

    pieces = Bundle("pieces")

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(32 * PAGE)
        self.marks: dict[int, tuple[memoryview, int]] = {}
        self.count = 0

    @rule(target=pieces, size=st.integers(0, 20 * PAGE))
    def allocate(self, size: int) -> int:
        self.count += 1
        try:
            made = self.pool.allocate(size)
        except CapacityExceeded:
            assert self.pool.largest_bytes < -(-size // PAGE) * PAGE
            return 0
        view = memoryview(made.buffer).cast("B")
        view[:] = bytes([self.count % 256]) * size
        self.marks[self.count] = (view, self.count % 256)
        return self.count

    @rule(piece=consumes(pieces))
    def let_go(self, piece: int) -> None:
        self.marks.pop(piece, None)

    @precondition(lambda self: self.marks)
    @rule()
    def let_go_of_all(self) -> None:
        self.marks.clear()
        assert self.pool.largest_bytes == self.pool.size_bytes

    @invariant()
    def nothing_is_lost_or_given_twice(self) -> None:
        used = sum(-(-len(view) // PAGE) * PAGE for view, _ in self.marks.values())
        assert self.pool.used_bytes == used
        for view, mark in self.marks.values():
            assert bytes(view) == bytes([mark]) * len(view)

    def teardown(self) -> None:
        self.pool.close()


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_an_allocation_shows_no_bytes_when_printed() -> None:
    with Pool(PAGE) as pool:
        assert isinstance(made := pool.allocate(PAGE), Allocation)
        assert "buffer" not in repr(made)
        assert repr(pool) == f"Pool({PAGE}, used_bytes={PAGE})"


@pytest.mark.parametrize("size_bytes", [0, -1, -(10**9)])
def test_a_pool_of_nothing_is_refused(size_bytes: int) -> None:
    with pytest.raises(InvalidArgument):
        Pool(size_bytes)
