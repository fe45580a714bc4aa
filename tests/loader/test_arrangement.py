"""Where partitions go, and how wide a ring may be."""

from __future__ import annotations

import pytest

from sllm.errors import CapacityExceeded
from sllm.loader.arrangement import RING_BYTES, Arrangement, arrange, ring_slots
from sllm.loader.format import PAGE_BYTES, Manifest, Partition

CHUNK = 2 * PAGE_BYTES


def arranged(*sizes: int) -> Arrangement:
    partitions = tuple(
        Partition(file=f"partition-{number:03d}.bin", size_bytes=size, sha256="", chunks=())
        for number, size in enumerate(sizes)
    )
    return arrange(Manifest(partitions=partitions, tensors={}, chunk_bytes=CHUNK))


def test_partitions_lie_one_behind_the_other() -> None:
    found = arranged(3 * PAGE_BYTES, 0, PAGE_BYTES)
    assert found.starts == (0, 3 * PAGE_BYTES, 3 * PAGE_BYTES)
    assert (found.size_bytes, found.chunk_bytes) == (4 * PAGE_BYTES, CHUNK)


def test_a_ring_is_no_wider_than_the_longest_partition_the_room_and_the_limit() -> None:
    arrangement = arranged(10 * CHUNK, 3 * CHUNK + PAGE_BYTES, 0)
    assert ring_slots(arrangement, 100 * CHUNK) == 10
    assert ring_slots(arrangement, 5 * CHUNK + 1) == 5
    assert ring_slots(arranged(2 * RING_BYTES), 1 << 40) * CHUNK == RING_BYTES


def test_a_ring_of_less_than_two_chunks_is_refused_unless_there_is_but_one() -> None:
    with pytest.raises(CapacityExceeded, match=f"{2 * CHUNK - 1} bytes are free"):
        ring_slots(arranged(10 * CHUNK), 2 * CHUNK - 1)
    assert ring_slots(arranged(PAGE_BYTES), CHUNK) == 1
    assert ring_slots(arranged(), 0) == 0
