"""Partition files, read past the page cache."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from loader.chunked import CHUNK, DATA, hashes, load
from loader.descriptors import descriptors

from sllm.errors import CapacityExceeded, ChunkCorrupt, PartitionMissing, PartitionTruncated, SllmError
from sllm.loader.memory import space
from sllm.loader.storage.direct import DirectFile


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
        target = bytearray(64)
        assert file.read_into(memoryview(target), 0) == 64
        assert target.startswith(b"Name:")


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


@pytest.mark.parametrize("left", [0, 1])
def test_a_process_without_descriptors_says_nothing_against_the_file(partition: Path, left: int) -> None:
    """With one left the file can be opened, but not again for O_DIRECT: it must not be read the slow way for that."""
    with descriptors(left), pytest.raises(SllmError, match="Too many open files") as raised:
        DirectFile(partition, len(DATA))
    assert type(raised.value) is SllmError
    assert "ulimit" in raised.value.hint


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


def test_memory_that_does_not_exist_is_not_the_checkpoints_fault(partition: Path) -> None:
    reserved = space.reserve(len(DATA)).view()
    with DirectFile(partition, len(DATA)) as file, pytest.raises(CapacityExceeded, match="memory"):
        load(file, place=lambda chunk: reserved[chunk * CHUNK :])


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
from sllm.loader.reading import ChunkReader
from sllm.loader.storage.direct import DirectFile
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
