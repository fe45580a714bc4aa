"""Chunks read by several threads, and verified."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loader.chunked import CHUNK, CHUNKS, DATA, hashes, load

from sllm.errors import Cancelled, CapacityExceeded, CheckpointUnreadable, ChunkCorrupt, DeadlineExceeded
from sllm.loader.reading import ChunkReader
from sllm.loader.storage.base import PartitionBytes
from sllm.loader.storage.fake import FakeSource


def test_a_partition_of_no_bytes_is_read_at_once() -> None:
    seen: list[int] = []
    assert load(FakeSource(b""), b"", on_ready=seen.append) == b""
    assert seen == []


def test_without_hashes_nothing_is_verified() -> None:
    assert load(FakeSource(DATA), b"other" * (len(DATA) // 5), hashes=None) == DATA


def test_bytes_that_were_wrong_once_are_read_again() -> None:
    source = FakeSource(DATA, flips={2 * CHUNK: 1, 7 * CHUNK + 5: 1})
    assert load(source) == DATA
    assert sum(size for _, size in source.reads) == len(DATA) + 2 * CHUNK


def test_bytes_that_are_wrong_in_a_cache_are_read_past_it() -> None:
    source = FakeSource(DATA, stale=[2 * CHUNK])
    assert load(source) == DATA


def test_bytes_that_are_wrong_twice_are_corrupt_and_not_read_a_third_time() -> None:
    source = FakeSource(DATA, flips={2 * CHUNK: 100})
    with pytest.raises(ChunkCorrupt, match="chunk 2 "):
        load(source, threads=1)
    assert [offset for offset, _ in source.reads].count(2 * CHUNK) == 2


@pytest.mark.parametrize("most_bytes", [1, 4095, 4096, 5000, CHUNK - 1])
def test_short_reads_are_resumed(most_bytes: int) -> None:
    data = DATA[: 2 * CHUNK] if most_bytes > 1 else DATA[:4096]
    assert load(FakeSource(data, most_bytes=most_bytes), data) == data


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.ESTALE])
def test_an_error_of_the_disk_is_unreadable_and_says_where(number: int) -> None:
    source = FakeSource(DATA, errors={3 * CHUNK + 1: OSError(number, os.strerror(number))})
    with pytest.raises(CheckpointUnreadable, match=f"at byte {3 * CHUNK}: {os.strerror(number)}"):
        load(source)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_of_the_disk_that_passes_is_read_over(number: int) -> None:
    hiccups = {place: OSError(number, os.strerror(number)) for place in (0, 3 * CHUNK + 1)}
    source = FakeSource(DATA, hiccups=hiccups)
    assert load(source) == DATA
    assert len(source.reads) == CHUNKS + 2


def test_an_error_of_the_disk_that_stays_is_not_met_a_third_time() -> None:
    source = FakeSource(DATA, errors={2 * CHUNK: OSError(errno.EIO, "broken")})
    with pytest.raises(CheckpointUnreadable):
        load(source, threads=1)
    assert [offset for offset, _ in source.reads].count(2 * CHUNK) == 2


@pytest.mark.parametrize("number", [errno.EFAULT, errno.ENOMEM])
def test_memory_that_cannot_be_had_is_not_the_checkpoints_fault(number: int) -> None:
    with pytest.raises(CapacityExceeded):
        load(FakeSource(DATA, errors={0: OSError(number, "no memory")}))


def test_an_error_of_a_callback_ends_the_load_even_at_the_last_chunk() -> None:
    def refuse(ready: int) -> None:
        if ready == CHUNKS:
            raise LookupError("the waiter")

    with pytest.raises(LookupError, match="the waiter"):
        load(FakeSource(DATA), on_ready=refuse)


def test_the_first_error_stops_the_others_and_no_thread_is_left() -> None:
    before = threading.active_count()
    source = FakeSource(DATA, errors={0: OSError(errno.EIO, "broken"), CHUNK: OSError(errno.EIO, "broken")})
    with pytest.raises(CheckpointUnreadable):
        load(source, threads=2)
    assert threading.active_count() == before
    assert len(source.reads) <= 2 * 2


@settings(deadline=None)
@given(order=st.permutations(range(CHUNKS)), threads=st.integers(1, 12))
def test_the_watermark_only_grows_over_chunks_that_are_in_place(order: list[int], threads: int) -> None:
    """Chunks end in any order that the threads allow: each read waits for those before it in `order`, if it can."""
    rank = {chunk: number for number, chunk in enumerate(order)}
    ended = {chunk: threading.Event() for chunk in range(CHUNKS)}
    # A read may only wait for a chunk that was begun before it, or it would wait for ever.
    waits_for = {
        chunk: max((c for c in range(chunk) if rank[c] < rank[chunk]), key=rank.__getitem__, default=None)
        for chunk in range(CHUNKS)
    }

    def gate(offset: int) -> None:
        earlier = waits_for[offset // CHUNK]
        if earlier is not None:
            ended[earlier].wait()

    view = memoryview(bytearray(len(DATA)))
    seen: list[int] = []

    def ready(chunks: int) -> None:
        assert bytes(view[: chunks * CHUNK]) == DATA[: chunks * CHUNK]
        seen.append(chunks)

    def place(chunk: int) -> memoryview:
        return view[chunk * CHUNK :]

    source = FakeSource(DATA, gate=gate)
    original = source.read_into

    class Ending(FakeSource):
        def read_into(self, view: memoryview, offset: int, *, fresh: bool = False) -> int:
            count = original(view, offset, fresh=fresh)
            ended[offset // CHUNK].set()
            return count

    ChunkReader(
        Ending(DATA), chunk_bytes=CHUNK, hashes=hashes(DATA), place=place, threads=threads, on_ready=ready
    ).read()
    assert seen == sorted(set(seen))
    assert seen[-1] == CHUNKS


def test_a_cancelled_load_ends_at_the_next_chunk() -> None:
    source = FakeSource(DATA)
    with pytest.raises(Cancelled, match=r"partition-000.bin"):
        load(source, threads=1, cancelled=lambda: len(source.reads) == 3)
    assert len(source.reads) == 3


def test_a_load_ends_at_its_deadline() -> None:
    source = FakeSource(DATA)
    with pytest.raises(DeadlineExceeded, match=f"0 of {CHUNKS} chunks"):
        load(source, deadline=time.monotonic())
    assert source.reads == []


# --- rings ----------------------------------------------------------------------------------


class Ring:
    """Takes what comes through `slots` slots."""

    def __init__(self, source: PartitionBytes, slots: int, **options: object) -> None:
        self.found = bytearray()
        self._source = source
        self._slots = [memoryview(bytearray(CHUNK)) for _ in range(slots)]
        self.reader = ChunkReader(
            source,
            chunk_bytes=CHUNK,
            hashes=hashes(DATA),
            place=lambda chunk: self._slots[chunk % slots],
            slots=slots,
            **options,  # type: ignore[arg-type]
        )

    def take(self, chunk: int) -> None:
        self.found += self._slots[chunk % len(self._slots)][: min(CHUNK, self._source.size_bytes - chunk * CHUNK)]
        self.reader.taken(chunk + 1)


@pytest.mark.parametrize("slots", [1, 2, 3, CHUNKS, CHUNKS + 1])
def test_a_ring_gives_every_byte_once_in_order(slots: int) -> None:
    ring = Ring(FakeSource(DATA), slots)
    ring.reader.start()
    for chunk in range(CHUNKS):
        assert ring.reader.wait_for(chunk + 1)
        ring.take(chunk)
    ring.reader.wait()
    assert bytes(ring.found) == DATA


def test_a_slot_may_be_given_back_by_whoever_is_told_that_it_is_ready() -> None:
    def ready(chunks: int) -> None:
        for chunk in range(len(ring.found) // CHUNK, chunks):
            ring.take(chunk)

    ring = Ring(FakeSource(DATA), 2, on_ready=ready)
    ring.reader.read()
    assert bytes(ring.found) == DATA


def test_nothing_is_read_into_a_slot_that_is_still_needed() -> None:
    source = FakeSource(DATA)
    ring = Ring(source, 2, deadline=time.monotonic() + 0.2)
    with pytest.raises(DeadlineExceeded, match=f"2 of {CHUNKS}"):
        ring.reader.read()
    assert sorted(offset for offset, _ in source.reads) == [0, CHUNK]


def test_a_ring_that_waits_for_its_taker_can_be_cancelled() -> None:
    ring = Ring(FakeSource(DATA), 2)
    ring.reader.start()
    assert ring.reader.wait_for(2)
    ring.reader.cancel()
    with pytest.raises(Cancelled):
        ring.reader.wait()


def test_whoever_waits_for_a_chunk_learns_that_it_will_not_come() -> None:
    ring = Ring(FakeSource(DATA, errors={CHUNK: OSError(errno.EIO, "broken")}), 4)
    ring.reader.start()
    assert not ring.reader.wait_for(CHUNKS)
    with pytest.raises(CheckpointUnreadable):
        ring.reader.wait()


def test_a_load_that_is_done_cannot_be_cancelled_any_more() -> None:
    ring = Ring(FakeSource(DATA), CHUNKS)
    ring.reader.start()
    assert ring.reader.wait_for(CHUNKS)
    ring.reader.cancel()
    ring.reader.wait()


# --- pauses ---------------------------------------------------------------------------------


class Pausing:
    """A reader that is paused as soon as it has begun to read chunk `at`."""

    def __init__(self, at: int, **options: object) -> None:
        self.is_paused = False
        self.at = at
        self.source = FakeSource(DATA, gate=self._pause)
        self.memory = memoryview(bytearray(CHUNKS * CHUNK))
        self.begun: list[int] = []
        self.reader = ChunkReader(
            self.source,
            chunk_bytes=CHUNK,
            hashes=hashes(DATA),
            place=lambda chunk: self.memory[chunk * CHUNK :],
            threads=1,
            paused=lambda: self.is_paused,
            **options,  # type: ignore[arg-type]
        )

    def _pause(self, offset: int) -> None:
        self.begun.append(offset // CHUNK)
        if offset == self.at * CHUNK:
            self.is_paused = True

    def go_on(self) -> None:
        self.is_paused = False
        self.reader.look_again()


def test_a_paused_reader_ends_the_chunk_under_way_and_goes_on_with_the_next() -> None:
    pausing = Pausing(2)
    pausing.reader.start()
    assert pausing.reader.wait_for(3)
    assert pausing.begun == [0, 1, 2]
    pausing.go_on()
    pausing.reader.wait()
    assert pausing.begun == list(range(CHUNKS))
    assert bytes(pausing.memory[: len(DATA)]) == DATA


def test_a_reader_may_be_paused_before_it_begins_and_told_again_that_it_still_is() -> None:
    pausing = Pausing(CHUNKS)
    pausing.is_paused = True
    pausing.reader.start()
    pausing.reader.look_again()
    assert pausing.begun == []
    pausing.go_on()
    pausing.reader.wait()
    assert bytes(pausing.memory[: len(DATA)]) == DATA


def test_a_paused_reader_can_be_cancelled() -> None:
    pausing = Pausing(1)
    pausing.reader.start()
    assert pausing.reader.wait_for(2)
    pausing.reader.cancel()
    with pytest.raises(Cancelled):
        pausing.reader.wait()
    assert pausing.begun == [0, 1]


def test_a_paused_reader_ends_at_its_deadline() -> None:
    pausing = Pausing(0, deadline=time.monotonic() + 0.2)
    with pytest.raises(DeadlineExceeded, match=f"1 of {CHUNKS}"):
        pausing.reader.read()
    assert pausing.begun == [0]


def test_an_error_of_the_chunk_under_way_ends_all_paused_threads() -> None:
    def gate(offset: int) -> None:
        begun.set()
        assert paused.wait(30)

    begun, paused = threading.Event(), threading.Event()
    source = FakeSource(DATA, errors={0: OSError(errno.EIO, "broken")}, gate=gate)
    memory = memoryview(bytearray(CHUNKS * CHUNK))
    reader = ChunkReader(
        source,
        chunk_bytes=CHUNK,
        hashes=hashes(DATA),
        place=lambda chunk: memory[chunk * CHUNK :],
        threads=3,
        paused=begun.is_set,
    )
    reader.start()
    assert begun.wait(30)
    paused.set()
    with pytest.raises(CheckpointUnreadable):
        reader.wait()
