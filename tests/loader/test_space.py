"""Address ranges."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from sllm.loader.memory import space

CHUNK = space.HUGE_BYTES


@pytest.fixture
def pool_fd() -> Iterator[int]:
    """A file of four chunks; each is full of its number."""
    fd = os.memfd_create("test-space")
    for number in range(4):
        os.pwrite(fd, bytes([number]) * CHUNK, number * CHUNK)
    yield fd
    os.close(fd)


def test_extents_lie_one_behind_the_other(pool_fd: int) -> None:
    mapped = space.map_extents(pool_fd, [(3 * CHUNK, CHUNK), (CHUNK, CHUNK)])
    assert mapped.size_bytes == 2 * CHUNK
    assert bytes(mapped.view(CHUNK - 2, 4)) == b"\x03\x03\x01\x01"


def test_a_range_begins_at_a_huge_page_and_is_as_long_as_asked() -> None:
    for size in (0, 1, 4096, CHUNK + 1):
        made = space.anonymous(size)
        assert made.address % space.HUGE_BYTES == 0
        assert len(made.view()) == size


def test_what_is_written_into_a_private_mapping_stays_in_this_process(pool_fd: int) -> None:
    read_only = os.open(f"/proc/self/fd/{pool_fd}", os.O_RDONLY)
    mapped = space.map_extents(read_only, [(0, CHUNK)])
    os.close(read_only)
    mapped.view(0, 1)[:] = b"\xff"
    assert os.pread(pool_fd, 1, 0) == b"\x00"


def test_what_is_written_into_a_shared_mapping_is_seen_by_all(pool_fd: int) -> None:
    mapped = space.map_extents(pool_fd, [(0, CHUNK)], shared=True)
    mapped.view(0, 1)[:] = b"\xff"
    assert os.pread(pool_fd, 1, 0) == b"\xff"


def test_a_read_only_mapping_shows_what_others_write_and_cannot_be_written(pool_fd: int) -> None:
    read_only = os.open(f"/proc/self/fd/{pool_fd}", os.O_RDONLY)
    mapped = space.map_extents(read_only, [(CHUNK, CHUNK), (0, CHUNK)], shared=True, writable=False)
    os.close(read_only)
    os.pwrite(pool_fd, b"\xff", 0)
    assert bytes(mapped.view(CHUNK - 1, 2)) == b"\x01\xff"
    assert set(permissions_of(mapped)) == {"r--s"}


def test_nothing_can_be_mapped_beyond_a_range(pool_fd: int) -> None:
    reserved = space.reserve(CHUNK)
    for offset, size in ((CHUNK, CHUNK), (0, 2 * CHUNK), (-CHUNK, CHUNK)):
        with pytest.raises(ValueError, match="outside"):
            space.map_file(reserved, pool_fd, offset=offset, file_offset=0, size_bytes=size, shared=True)


def test_a_descriptor_that_cannot_be_mapped_is_an_error() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="mmap"):
            space.map_extents(reading, [(0, CHUNK)])
    finally:
        os.close(reading)
        os.close(writing)


def test_populated_memory_is_present() -> None:
    made = space.anonymous(8 * CHUNK)
    before = resident_bytes(made)
    space.populate(made, write=True, threads=3)
    assert before == 0
    assert resident_bytes(made) == 8 * CHUNK


def test_only_the_part_that_is_asked_for_is_populated() -> None:
    made = space.anonymous(4 * CHUNK)
    space.populate(made, write=True, offset=CHUNK, size_bytes=CHUNK)
    assert resident_bytes(made) == CHUNK


def test_populating_stops_when_told() -> None:
    made = space.anonymous(2 * space.POPULATE_STEP_BYTES)
    asked: list[int] = []
    space.populate(made, write=True, stopped=lambda: bool(asked) or asked.append(1) is not None)
    assert resident_bytes(made) == space.POPULATE_STEP_BYTES


def test_memory_that_is_not_there_is_an_error_whatever_the_threads(pool_fd: int) -> None:
    reserved = space.reserve(8 * CHUNK)
    space.map_file(reserved, pool_fd, offset=0, file_offset=0, size_bytes=8 * CHUNK, shared=True)  # half of it exists
    with pytest.raises(OSError, match="madvise"):
        space.populate(reserved, write=True, threads=4)


def permissions_of(made: space.Space) -> Iterator[str]:
    """Yield the permissions of each mapping in a range, as /proc says them."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            addresses, permissions = line.split()[:2]
            if made.address <= int(addresses.split("-")[0], 16) < made.address + made.size_bytes:
                yield permissions


def resident_bytes(made: space.Space) -> int:
    """Return how much of a range is present, by mincore(2)."""
    pages = (ctypes.c_ubyte * (made.size_bytes // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(made.address), ctypes.c_size_t(made.size_bytes), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE
