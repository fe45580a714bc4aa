"""The pool as a memory object, and leases as descriptors."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sllm.core.grant import POOL_BLOCK_BYTES, Extent
from sllm.errors import InvalidArgument
from sllm.loader.memory import space
from sllm.loader.memory.shared import SharedPool, free_huge_bytes

CHUNK = POOL_BLOCK_BYTES
FIRST, SECOND = Extent(0, CHUNK), Extent(CHUNK, CHUNK)


@pytest.fixture
def pool() -> Iterator[SharedPool]:
    pool = SharedPool.create(4 * CHUNK + 5, hugepages=False)
    yield pool
    os.close(pool.fd)


def present_bytes(pool: SharedPool) -> int:
    """Return how much of it takes memory already; the rest comes as it is touched."""
    return os.fstat(pool.fd).st_blocks * 512


def test_a_pool_has_whole_blocks_and_no_memory_until_it_is_used(pool: SharedPool) -> None:
    assert pool.size_bytes == 4 * CHUNK
    assert present_bytes(pool) == 0
    pool.view(0, 1)[0] = 7
    assert 0 < present_bytes(pool) <= CHUNK
    assert not pool.huge


def test_nobody_can_change_its_size(pool: SharedPool) -> None:
    for size_bytes in (0, 8 * CHUNK):
        with pytest.raises(PermissionError):
            os.ftruncate(pool.fd, size_bytes)


def test_what_is_leased_is_known_for_as_long_as_any_copy_of_the_descriptor_is_open(pool: SharedPool) -> None:
    lease = pool.lease((FIRST,))
    assert pool.leased((FIRST,))
    assert not pool.leased((SECOND,))
    assert pool.leased((SECOND, FIRST))
    copy = os.dup(lease)
    os.close(lease)
    assert pool.leased((FIRST,))
    os.close(copy)
    assert not pool.leased((FIRST,))


def test_leases_of_the_same_memory_do_not_disturb_each_other(pool: SharedPool) -> None:
    one, other = pool.lease((FIRST, SECOND)), pool.lease((SECOND,))
    os.close(one)
    assert not pool.leased((FIRST,))
    assert pool.leased((SECOND,))
    os.close(other)


def test_a_lease_ends_when_its_last_holder_is_killed(pool: SharedPool) -> None:
    lease = pool.lease((FIRST,))
    pid = os.fork()
    if pid == 0:
        signal.pause()
    os.close(lease)
    assert pool.leased((FIRST,))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not pool.leased((FIRST,))


def test_a_lease_can_be_mapped_privately_and_changes_nothing(pool: SharedPool) -> None:
    pool.view(CHUNK, 3)[:] = b"abc"
    lease = pool.lease((SECOND,))
    with pytest.raises(OSError):
        os.pwrite(lease, b"x", CHUNK)
    with pytest.raises(PermissionError):
        mmap.mmap(lease, CHUNK, flags=mmap.MAP_SHARED, offset=CHUNK)
    with mmap.mmap(lease, CHUNK, flags=mmap.MAP_PRIVATE, offset=CHUNK) as mapped:
        assert mapped[:3] == b"abc"
        mapped[:3] = b"xyz"
    assert bytes(pool.view(CHUNK, 3)) == b"abc"
    os.close(lease)


def test_the_next_owner_sees_content_and_leases(pool: SharedPool) -> None:
    pool.view(0, 3)[:] = b"abc"
    lease = pool.lease((FIRST,))
    again = SharedPool.adopt(os.dup(pool.fd))
    assert bytes(again.view(0, 3)) == b"abc"
    assert again.leased((FIRST,))
    os.close(lease)
    assert not again.leased((FIRST,))
    os.close(again.fd)


def test_what_is_no_pool_is_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(16))
    unsealed = os.memfd_create("x")
    os.ftruncate(unsealed, CHUNK)
    for fd in (os.open(tmp_path / "file", os.O_RDWR), unsealed, os.open("/dev/null", os.O_RDWR)):
        with pytest.raises(InvalidArgument):
            SharedPool.adopt(fd)
        os.close(fd)


def test_prefaulting_fills_all_memory_and_can_be_stopped(pool: SharedPool) -> None:
    stopped = threading.Event()
    stopped.set()
    pool.prefault(lock=False, stopped=stopped)
    assert present_bytes(pool) == 0
    pool.prefault(lock=False, stopped=threading.Event())
    assert present_bytes(pool) == pool.size_bytes


def test_memory_that_may_not_be_locked_is_a_warning(pool: SharedPool, caplog: pytest.LogCaptureFixture) -> None:
    pid = os.fork()
    if pid == 0:  # a user who may lock nothing
        import resource

        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        if os.geteuid() == 0:
            os.setuid(65534)
        pool.prefault(lock=True, stopped=threading.Event())
        os._exit(0 if "LimitMEMLOCK" in caplog.text else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert present_bytes(pool) == pool.size_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HugePages_Free: 10\nHugePages_Rsvd: 4\nHugepagesize: 2048 kB\n", 12 << 20),
        ("HugePages_Free: 10\nHugePages_Rsvd: 0\nHugepagesize: 1048576 kB\n", 0),
        ("MemTotal: 1 kB\n", 0),
    ],
)
def test_counts_huge_pages_that_can_be_had(tmp_path: Path, text: str, expected: int) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert free_huge_bytes(tmp_path / "meminfo") == expected


def test_without_enough_huge_pages_the_pool_has_small_ones() -> None:
    size_bytes = free_huge_bytes() + CHUNK
    pool = SharedPool.create(size_bytes, hugepages=True)
    assert not pool.huge
    os.close(pool.fd)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Reserve some for the test, where that is allowed."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = setting.read_text()
    try:
        setting.write_text(str(int(before) + 2 * CHUNK // (2 << 20)))
    except OSError:
        pytest.skip("huge pages cannot be reserved here")
    if free_huge_bytes() < 2 * CHUNK:
        setting.write_text(before)
        pytest.skip("this machine has no huge pages to give")
    yield
    setting.write_text(before)


@pytest.mark.usefixtures("huge_pages")
def test_a_pool_of_huge_pages_is_leased_and_adopted_alike() -> None:
    pool = SharedPool.create(2 * CHUNK, hugepages=True)
    assert pool.huge
    pool.view(CHUNK, 3)[:] = b"abc"
    lease = pool.lease((SECOND,))
    again = SharedPool.adopt(os.dup(pool.fd))
    assert again.huge
    assert again.leased((SECOND,))
    assert not again.leased((FIRST,))
    mapped = space.map_extents(lease, (SECOND,))  # reserves no huge pages of its own: there are none left
    assert bytes(mapped.view(0, 3)) == b"abc"
    for fd in (lease, pool.fd, again.fd):
        os.close(fd)
