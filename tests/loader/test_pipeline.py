"""SSD -> memory -> device, with a device of ordinary memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import xxhash

from sllm.errors import Cancelled, ChunkCorrupt, DeadlineExceeded, OperationFailed
from sllm.loader.arrangement import Arrangement, arrange
from sllm.loader.format import Manifest, Partition
from sllm.loader.memory.fake import FakeCopier
from sllm.loader.pipeline import COPIES_UNDER_WAY, Control, Pipeline
from sllm.loader.storage.fake import FakeSource

CHUNK = 8192
DATA = (os.urandom(10 * CHUNK), os.urandom(3 * CHUNK + 4096), b"", os.urandom(4096))
WHOLE = b"".join(DATA)


def arranged(*contents: bytes) -> Arrangement:
    partitions = tuple(
        Partition(
            file=f"partition-{number:03d}.bin",
            size_bytes=len(data),
            sha256="",
            chunks=tuple(xxhash.xxh3_64_hexdigest(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)),
        )
        for number, data in enumerate(contents)
    )
    return arrange(Manifest(partitions=partitions, tensors={}, chunk_bytes=CHUNK))


def run(sources: list[FakeSource], control: Control = Control(), **options: object) -> bytearray:  # noqa: B008 - frozen
    """Load DATA into ordinary memory; return it."""
    memory = bytearray(len(WHOLE))
    pipeline = Pipeline(arranged(*DATA), sources, memoryview(memory), control, **options)  # type: ignore[arg-type]
    pipeline.start()
    pipeline.wait()
    return memory


def run_onto_device(
    sources: list[FakeSource], slots: int, before: Callable[[int], None] = lambda offset: None, **control: object
) -> tuple[bytearray, FakeCopier]:
    """Load DATA through a ring onto a device; return the device's memory. The copier is closed, whatever happens."""
    device = bytearray(len(WHOLE))
    copier = FakeCopier(memoryview(device), before)
    ring = memoryview(bytearray(slots * CHUNK))
    options = Control(**control)  # type: ignore[arg-type]
    pipeline = Pipeline(arranged(*DATA), sources, ring, options, copier=copier, slots=slots)
    pipeline.start()
    try:
        pipeline.wait()
    finally:
        assert copier.is_closed
    return device, copier


def sources() -> list[FakeSource]:
    return [FakeSource(data, name=f"partition-{number:03d}.bin") for number, data in enumerate(DATA)]


def test_all_partitions_lie_one_behind_the_other() -> None:
    assert run(sources()) == WHOLE


@pytest.mark.parametrize("slots", [2, 3, 5, 10, 50])
def test_what_goes_through_a_ring_arrives_whole(slots: int) -> None:
    device, copier = run_onto_device(sources(), slots)
    assert device == WHOLE
    assert copier.most_under_way <= min(COPIES_UNDER_WAY, slots - 1)


def test_a_chunk_is_copied_out_while_later_ones_are_read() -> None:
    """The copy of the first chunk ends only when the third has been read."""
    read = threading.Event()

    def gate(offset: int) -> None:
        if offset == 2 * CHUNK:
            read.set()

    found = sources()
    found[0] = FakeSource(DATA[0], gate=gate)
    device, _ = run_onto_device(found, 5, lambda offset: None if read.wait(30) else pytest.fail("nothing was read"))
    assert device == WHOLE


def test_later_chunks_are_read_only_as_slots_become_free() -> None:
    """While chunk n is copied out, nothing behind chunk n + slots has been read."""
    found = sources()
    ahead: list[int] = []

    def before(offset: int) -> None:
        if offset < len(DATA[0]):
            ahead.append(len(found[0].reads) - offset // CHUNK)

    device, _ = run_onto_device(found, 3, before)
    assert device == WHOLE
    assert len(ahead) == 10
    assert 1 <= min(ahead) <= max(ahead) <= 3


def test_progress_counts_bytes_up_to_all_of_them_in_order() -> None:
    for onto_device in (False, True):
        seen: list[tuple[int, int]] = []

        def progress(done: int, total: int, seen: list[tuple[int, int]] = seen) -> None:
            seen.append((done, total))

        if onto_device:
            run_onto_device(sources(), 4, progress=progress)
        else:
            run(sources(), Control(progress=progress))
        assert seen == sorted(set(seen))
        assert seen[-1] == (len(WHOLE), len(WHOLE))


def test_a_bad_chunk_ends_the_load_wherever_it_goes() -> None:
    for partition in (0, 1, 3):
        found = sources()
        found[partition] = FakeSource(DATA[partition], name=f"partition-{partition:03d}.bin", flips={0: 100})
        with pytest.raises(ChunkCorrupt, match=f"partition-{partition:03d}.bin: chunk 0"):
            run(found)
        found[partition] = FakeSource(DATA[partition], name=f"partition-{partition:03d}.bin", flips={0: 100})
        with pytest.raises(ChunkCorrupt, match=f"partition-{partition:03d}.bin: chunk 0"):
            run_onto_device(found, 2)


def test_nothing_that_is_not_verified_reaches_the_device() -> None:
    found = sources()
    found[0] = FakeSource(DATA[0], flips={4 * CHUNK: 100})
    copied: list[int] = []
    with pytest.raises(ChunkCorrupt):
        run_onto_device(found, 3, copied.append)
    assert set(copied) <= {n * CHUNK for n in range(4)}


def test_an_error_of_the_device_ends_the_load_and_is_what_is_raised() -> None:
    def before(offset: int) -> None:
        if offset == 3 * CHUNK:
            raise OperationFailed("a copy to fake:0 failed")

    threads = threading.active_count()
    with pytest.raises(OperationFailed, match="fake:0"):
        run_onto_device(sources(), 2, before)
    assert threading.active_count() == threads


def test_a_load_is_cancelled_and_late_on_a_device_too() -> None:
    with pytest.raises(Cancelled):
        run_onto_device(sources(), 2, cancelled=lambda: True)
    with pytest.raises(DeadlineExceeded):
        run_onto_device(sources(), 2, deadline=time.monotonic())


def test_a_load_can_be_stopped_from_outside() -> None:
    reading, stopped = threading.Event(), threading.Event()

    def gate(offset: int) -> None:
        reading.set()
        stopped.wait(30)

    found = sources()
    found[0] = FakeSource(DATA[0], gate=gate)
    pipeline = Pipeline(arranged(*DATA), found, memoryview(bytearray(len(WHOLE))), Control())
    pipeline.start()
    assert reading.wait(30)
    pipeline.stop()
    stopped.set()
    with pytest.raises(Cancelled):
        pipeline.wait()
