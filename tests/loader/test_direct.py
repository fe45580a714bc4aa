"""Chunks read past the page cache, by several threads, and verified."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.errors import (
    Cancelled,
    CapacityExceeded,
    CheckpointUnreadable,
    ChunkCorrupt,
    DeadlineExceeded,
    PartitionMissing,
    PartitionTruncated,
)
from sllm.loader.memory import space
from sllm.loader.storage.base import Source
from sllm.loader.storage.direct import ChunkReader, DirectFile
from sllm.loader.storage.fake import FakeSource

CHUNK = 64 << 10
DATA = os.urandom(10 * CHUNK + 4096)
CHUNKS = 11


def hashes(data: bytes) -> list[str]:
    return [xxhash.xxh3_64_hexdigest(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)]


def load(source: Source, data: bytes = DATA, **options: object) -> bytes:
    """Read a source into memory; return what the memory holds."""
    memory = space.anonymous(source.size_bytes)
    view = memory.view()
    reader = ChunkReader(
        source,
        chunk_bytes=CHUNK,
        **{"hashes": hashes(data), "place": lambda chunk: view[chunk * CHUNK :], **options},  # type: ignore[arg-type]
    )
    reader.read()
    return bytes(view)


@pytest.fixture
def partition(tmp_path: Path) -> Path:
    path = tmp_path / "partition-000.bin"
    path.write_bytes(DATA)
    return path


def test_what_was_written_is_read(partition: Path) -> None:
    with DirectFile(partition, len(DATA)) as file:
        assert load(file) == DATA


def test_memory_that_is_not_aligned_is_read_into_all_the_same(partition: Path) -> None:
    target = bytearray(len(DATA) + 1)
    view = memoryview(target)[1:]
    with DirectFile(partition, len(DATA)) as file:
        load(file, place=lambda chunk: view[chunk * CHUNK :])
    assert bytes(view) == DATA


def test_a_file_system_without_direct_io_is_read_through_the_page_cache() -> None:
    # /proc has regular files that cannot be opened with O_DIRECT; this one's length is 0, which a manifest may say.
    with DirectFile("/proc/self/status", 0) as file:
        assert not file.is_direct
        target = bytearray(64)
        assert file.read_into(memoryview(target), 0) == 64
        assert target.startswith(b"Name:")


def test_a_partition_of_no_bytes_is_read_at_once() -> None:
    seen: list[int] = []
    assert load(FakeSource(b""), b"", on_ready=seen.append) == b""
    assert seen == []


@pytest.mark.parametrize("kind", ["nothing", "link", "dangling link", "folder", "fifo", "device", "under a file"])
def test_what_is_no_regular_file_is_missing(partition: Path, kind: str) -> None:
    path = partition.with_name("other.bin")
    if kind == "link":
        path.symlink_to(partition)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "under a file":
        path = partition / "other.bin"
    with pytest.raises(PartitionMissing, match=path.name):
        DirectFile(path, len(DATA))


@pytest.mark.parametrize("expected", [0, len(DATA) - 4096, len(DATA) + 4096])
def test_a_file_of_another_length_is_refused_before_it_is_read(partition: Path, expected: int) -> None:
    with pytest.raises(PartitionTruncated, match=f"{len(DATA)} bytes, its manifest says {expected}"):
        DirectFile(partition, expected)


def test_no_descriptor_is_left_by_a_file_that_was_refused(partition: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(PartitionTruncated):
        DirectFile(partition, 1)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_shrinks_while_it_is_read_is_truncated(partition: Path) -> None:
    with DirectFile(partition, len(DATA)) as file:
        os.truncate(partition, 3 * CHUNK)
        with pytest.raises(PartitionTruncated, match="ended at byte"):
            load(file)


def test_a_flipped_bit_on_the_disk_is_a_corrupt_chunk(partition: Path) -> None:
    flipped = bytearray(DATA)
    flipped[5 * CHUNK + 17] ^= 1
    partition.write_bytes(flipped)
    with DirectFile(partition, len(DATA)) as file, pytest.raises(ChunkCorrupt, match=r"partition-000.bin: chunk 5 "):
        load(file)


def test_without_hashes_nothing_is_verified(partition: Path) -> None:
    with DirectFile(partition, len(DATA)) as file:
        assert load(file, b"other" * (len(DATA) // 5), hashes=None) == DATA


def test_bytes_that_were_wrong_once_are_read_again() -> None:
    source = FakeSource(DATA, flips={2 * CHUNK: 1, 7 * CHUNK + 5: 1})
    assert load(source) == DATA
    assert sum(size for _, size in source.reads) == len(DATA) + 2 * CHUNK


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


@pytest.mark.parametrize("number", [errno.EFAULT, errno.ENOMEM])
def test_memory_that_cannot_be_had_is_not_the_checkpoints_fault(number: int) -> None:
    with pytest.raises(CapacityExceeded):
        load(FakeSource(DATA, errors={0: OSError(number, "no memory")}))


def test_memory_that_does_not_exist_is_not_the_checkpoints_fault(partition: Path) -> None:
    reserved = space.reserve(len(DATA)).view()
    with DirectFile(partition, len(DATA)) as file, pytest.raises(CapacityExceeded, match="memory"):
        load(file, place=lambda chunk: reserved[chunk * CHUNK :])


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

    def __init__(self, source: Source, slots: int, **options: object) -> None:
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


# --- faults of a real file, by libfiu -------------------------------------------------------

# CPython calls preadv2, which libfiu does not know: this leads it to pread, which it does. (Of preadv libfiu can only
# leave out whole buffers, and there is one.)
SHIM = """
#include <sys/uio.h>
#include <unistd.h>
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off_t at, int flags) {
  return pread(fd, v->iov_base, v->iov_len, at);
}
"""
READING = """
import sys
from sllm.errors import SllmError
from sllm.loader.memory import space
from sllm.loader.storage.direct import ChunkReader, DirectFile
path, size, chunk, hashes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(",")
view = space.anonymous(size).view()
with DirectFile(path, size) as file:
    try:
        ChunkReader(file, chunk_bytes=chunk, hashes=hashes, place=lambda n: view[n * chunk:]).read()
        print("whole" if bytes(view) == open(path, "rb").read() else "different")
    except SllmError as error:
        print(error.reason, error.message)
"""


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], str]:
    """Read a file with a libfiu command in force; return what the reader says."""
    compiler = shutil.which("cc")
    if compiler is None or shutil.which("fiu-run") is None:
        pytest.skip("needs fiu-run and cc: apt-get install fiu-utils libfiu-dev gcc, or make setup as root")
    shim = tmp_path_factory.mktemp("shim") / "preadv2.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-D_GNU_SOURCE", "-xc", "-", "-o", shim], input=SHIM, text=True, check=True
    )

    def run(fault: str, path: Path) -> str:
        # fiu-run sets LD_PRELOAD, whatever it was.
        add_shim = f'LD_PRELOAD="$LD_PRELOAD {shim}" exec "$@"'
        command = ["fiu-run", "-x", "-c", fault, "sh", "-c", add_shim, "sh", sys.executable, "-c", READING]
        found = subprocess.run(
            [*command, str(path), str(len(DATA)), str(CHUNK), ",".join(hashes(DATA))],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return found.stdout.strip()

    return run


def test_an_injected_disk_error_is_unreadable(with_faults: Callable[[str, Path], str], partition: Path) -> None:
    found = with_faults(f"enable name=posix/io/rw/pread,failinfo={errno.EIO}", partition)
    assert found.startswith("CHECKPOINT_UNREADABLE"), found
    assert "Input/output error" in found


def test_injected_short_reads_lose_nothing(with_faults: Callable[[str, Path], str], partition: Path) -> None:
    found = with_faults("enable_random name=posix/io/rw/pread/reduce,probability=0.7", partition)
    assert found == "whole"


def test_an_error_that_comes_and_goes_is_an_error_or_nothing(
    with_faults: Callable[[str, Path], str], partition: Path
) -> None:
    command = f"enable_random name=posix/io/rw/pread,probability=0.1,failinfo={errno.EIO}"
    for _ in range(3):
        found = with_faults(command, partition)
        assert found == "whole" or found.startswith("CHECKPOINT_UNREADABLE"), found
