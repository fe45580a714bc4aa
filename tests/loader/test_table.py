"""Which memory of a pool belongs to what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sllm.core.grant import POOL_BLOCK_BYTES, Extent
from sllm.loader.memory.table import Entry, EntryState, Table

CHUNK = POOL_BLOCK_BYTES
ALL = (Extent(0, 8 * CHUNK),)


def nobody(extents: Sequence[Extent]) -> bool:
    return False


def everybody(extents: Sequence[Extent]) -> bool:
    return True


def add(table: Table, digest: str, chunks: int, *, slots: int | None = None, now: float = 0.0) -> Entry:
    return table.add(
        digest=digest,
        partition=0,
        checkpoint=digest,
        folder=f"/{digest}",
        size_bytes=chunks * CHUNK,
        chunk_bytes=CHUNK,
        slots=chunks if slots is None else slots,
        now=now,
    )


def test_a_partition_takes_whole_blocks_of_the_pool_and_an_empty_one_too() -> None:
    table = Table(8 * CHUNK, 1)
    small = table.add(
        digest="a", partition=0, checkpoint="a", folder="/a", size_bytes=4096, chunk_bytes=1 << 20, slots=1, now=0.0
    )
    assert small.held_bytes == CHUNK
    assert (add(table, "empty", 0).held_bytes, table.free_bytes) == (CHUNK, 6 * CHUNK)


def test_what_is_read_or_leased_never_makes_room() -> None:
    table = Table(8 * CHUNK, 1)
    loading, ready = add(table, "loading", 4), add(table, "ready", 4)
    table.ready(ready.generation, 1.0)
    assert table.victims(CHUNK, 1.0, everybody) is None
    assert table.victims(5 * CHUNK, 1.0, nobody) is None
    assert table.victims(CHUNK, 1.0, nobody) == (table.get(ready.generation),)
    assert table.get(loading.generation) == loading


def test_what_is_to_be_verified_makes_room_unless_somebody_waits_for_it() -> None:
    table = Table(8 * CHUNK, 1)
    generations = [table.ready(add(table, digest, 4).generation, 1.0).generation for digest in ("a", "b")]
    table = Table.adopt(8 * CHUNK, 1, table.entries, nobody)
    awaited, other = generations
    assert table.victims(CHUNK, 1.0, nobody, {awaited}) == (table.get(other),)
    assert table.victims(8 * CHUNK, 1.0, nobody) == table.entries
    assert table.victims(CHUNK, 1.0, nobody, generations) is None
    assert table.victims(CHUNK, 1.0, everybody) is None
    assert table.ring_slots(CHUNK, 8, 1.0, nobody, {awaited}) == 4


def test_what_is_cheap_to_read_again_makes_room_first() -> None:
    table = Table(8 * CHUNK, 1)
    for digest, reload_s in (("dear", 60.0), ("cheap", 1.0)):
        generation = add(table, digest, 4).generation
        table.ready(generation, reload_s)
        table.use(generation, 1.0)
    victims = table.victims(CHUNK, 2.0, nobody)
    assert victims is not None
    assert [entry.digest for entry in victims] == ["cheap"]


def test_memory_that_is_leased_when_its_entry_goes_is_kept_back_until_it_is_not() -> None:
    table = Table(8 * CHUNK, 1)
    entry = add(table, "a", 4)
    last = Extent(entry.extents[0].offset + 3 * CHUNK, CHUNK)
    table.drop(entry.generation, lambda extents: any(_overlap(extent, last) for extent in extents))
    assert (table.entries, table.free_bytes) == ((), 7 * CHUNK)
    assert table.victims(8 * CHUNK, 0.0, nobody) == ()
    assert table.free_bytes == 8 * CHUNK


def test_a_ring_is_used_by_its_one_reader_only() -> None:
    table = Table(8 * CHUNK, 1)
    ring = add(table, "a", 20, slots=4)
    assert ring.is_ring
    assert ring.held_bytes == 4 * CHUNK
    assert table.find("a", 0) is None
    assert table.ring_slots(CHUNK, 8, 0.0, nobody) == 4
    add(table, "b", 4)
    assert table.ring_slots(CHUNK, 8, 0.0, nobody) == 0


def test_the_next_owner_verifies_what_was_whole_and_drops_the_rest() -> None:
    table = Table(8 * CHUNK, 1)
    whole, half, ring = add(table, "whole", 2), add(table, "half", 2), add(table, "ring", 20, slots=2)
    whole = table.ready(whole.generation, 3.0)
    entries = [Entry.from_json(entry.as_json()) for entry in table.entries]
    assert entries == list(table.entries)
    leased = half.extents
    next_table = Table.adopt(8 * CHUNK, 1, entries, lambda extents: any(_overlap(e, leased[0]) for e in extents))
    assert [(entry.digest, entry.state, entry.reload_s) for entry in next_table.entries] == [
        ("whole", EntryState.VERIFYING, 3.0)
    ]
    assert next_table.free_bytes == 4 * CHUNK  # and two chunks are kept back: they are leased
    assert add(next_table, "new", 1).generation > ring.generation


@pytest.mark.parametrize(
    "extents", [((0, 2 * CHUNK), (CHUNK, CHUNK)), ((7 * CHUNK, 2 * CHUNK),), ((1, CHUNK),), ((0, 0),)]
)
def test_a_table_that_cannot_be_true_is_refused(extents: tuple[tuple[int, int], ...]) -> None:
    entry = add(Table(8 * CHUNK, 1), "a", 2).as_json() | {"extents": extents, "state": "ready"}
    with pytest.raises(ValueError):
        Table.adopt(8 * CHUNK, 1, [Entry.from_json(entry)], nobody)


def _overlap(one: Extent, other: Extent) -> bool:
    return one.offset < other.offset + other.size_bytes and other.offset < one.offset + one.size_bytes


class Pool(RuleBasedStateMachine):
    """A table, the leases there are, and the memory that each lease holder believes to be its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(32 * CHUNK, 1)
        self.leases: list[tuple[Extent, ...]] = []
        self.now = 0.0
        self.generations: set[int] = set()

    def leased(self, extents: Sequence[Extent]) -> bool:
        return any(_overlap(extent, held) for extent in extents for lease in self.leases for held in lease)

    @rule(digest=st.sampled_from("abcdef"), chunks=st.integers(0, 40), lease=st.booleans())
    def load(self, digest: str, chunks: int, lease: bool) -> None:
        self.now += 1.0
        if self.table.find(digest, 0) is not None:
            return
        victims, slots = self.table.victims(chunks * CHUNK, self.now, self.leased), chunks
        if victims is None:
            slots = self.table.ring_slots(CHUNK, 8, self.now, self.leased)
            victims = self.table.victims(slots * CHUNK, self.now, self.leased) if slots else None
        if victims is None:
            return
        for victim in victims:
            assert not self.leased(victim.extents)
            assert victim.state is not EntryState.LOADING
            self.table.drop(victim.generation, self.leased)
        entry = add(self.table, digest, chunks, slots=slots, now=self.now)
        assert not self.leased(entry.extents), "memory that somebody has was given out again"
        assert entry.generation not in self.generations
        self.generations.add(entry.generation)
        if lease:
            self.leases.append(entry.extents)

    @precondition(lambda self: self.table.entries)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.table.entries))
        if entry.is_ring:
            self.table.drop(entry.generation, self.leased)
        elif entry.state is not EntryState.READY:
            self.table.ready(entry.generation, 1.0)

    @precondition(lambda self: self.table.entries)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.table.drop(data.draw(st.sampled_from(self.table.entries)).generation, self.leased)

    @precondition(lambda self: self.table.entries)
    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.table.entries))
        self.leases.append(entry.extents)
        self.table.use(entry.generation, self.now)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.leases.remove(data.draw(st.sampled_from(self.leases)))

    @rule(lost=st.booleans())
    def crash_and_adopt(self, lost: bool) -> None:
        """`lost`: the last word of the store process, about its newest entry, never came."""
        known = self.table.entries[:-1] if lost else self.table.entries
        before = max(self.generations, default=0) + 1
        self.table = Table.adopt(32 * CHUNK, before, known, self.leased)
        assert all(entry.state is EntryState.VERIFYING for entry in self.table.entries)

    @invariant()
    def every_byte_has_one_owner(self) -> None:
        table = self.table
        held = [extent for entry in table.entries for extent in entry.extents]
        everything = [*held, *table._free.extents, *table._kept_back]
        chunks = Counter(offset for extent in everything for offset in range(extent.offset, sum(extent), CHUNK))
        assert chunks == Counter(range(0, table.size_bytes, CHUNK))

    @invariant()
    def nothing_leased_is_free(self) -> None:
        assert not self.leased(self.table._free.extents)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
