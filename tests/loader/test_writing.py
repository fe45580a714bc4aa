"""Writing: what is streamed is what lies there, and a checkpoint appears whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from sllm.errors import Cancelled, Conflict, NotFound, SllmError
from sllm.loader.folder import read_manifest
from sllm.loader.format import PAGE_BYTES, Manifest, chunk_bytes_for
from sllm.loader.verifying import verify
from sllm.loader.writing import CheckpointWriter, Meter

MIB = 1 << 20


def noise(size_bytes: int, seed: int = 1) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(size_bytes)


def write(path: Path | None, *contents: bytes, meter: Meter | None = None, **files: bytes) -> Manifest:
    """Write a checkpoint whose partitions hold these bytes and which has no tensors."""
    with CheckpointWriter(path, [len(content) for content in contents], meter) as writer:
        for content in contents:
            with writer.partition() as partition:
                partition.write(content)
        for name, content in files.items():
            writer.add_file(name, [content])
        return writer.commit({})


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("size", [0, PAGE_BYTES, MIB - PAGE_BYTES, MIB, MIB + PAGE_BYTES, 9 * MIB])
def test_what_is_streamed_is_what_lies_there(tmp_path: Path, size: int) -> None:
    content = noise(size)
    manifest = write(tmp_path / "c", content)
    (partition,) = manifest.partitions
    step = chunk_bytes_for(size)
    assert (tmp_path / "c" / partition.file).read_bytes() == content
    assert partition.sha256 == hashlib.sha256(content).hexdigest()
    assert partition.chunks == tuple(
        xxhash.xxh3_64_hexdigest(content[at : at + step]) for at in range(0, len(content), step)
    )
    assert verify(tmp_path / "c", deep=True).manifest == manifest


def test_gaps_and_the_end_are_zeros_also_where_a_buffer_was_used_before(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "c", [20 * MIB]) as writer:
        with writer.partition() as partition:
            partition.write(noise(12 * MIB))
            partition.skip_to(14 * MIB + 64)
            partition.write(b"x")
            assert partition.position == 14 * MIB + 65
        writer.commit({})
    expected = noise(12 * MIB) + bytes(2 * MIB + 64) + b"x"
    assert (tmp_path / "c" / "partition-000.bin").read_bytes() == expected.ljust(20 * MIB, b"\0")


def test_every_partition_has_its_own_bytes(tmp_path: Path) -> None:
    contents = [noise(2 * PAGE_BYTES, 1), b"", noise(3 * MIB, 2)]
    manifest = write(tmp_path / "c", *contents)
    assert [(tmp_path / "c" / p.file).read_bytes() for p in manifest.partitions] == contents
    assert [p.file for p in manifest.partitions] == ["partition-000.bin", "partition-001.bin", "partition-002.bin"]


def test_execution_files_are_listed_by_name_whatever_the_order_they_come_in(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c", b"", **{"b.json": b"{}", "a.json": b""})
    assert [(file.path, file.size_bytes) for file in manifest.execution_files] == [("a.json", 0), ("b.json", 2)]
    assert verify(tmp_path / "c").files == 2


def test_the_same_bytes_have_the_same_digest_written_or_only_hashed(tmp_path: Path) -> None:
    contents = (noise(5 * MIB), noise(PAGE_BYTES))
    written = write(tmp_path / "c", *contents, a=b"x")
    assert write(None, *contents, a=b"x") == written
    assert left(tmp_path) == ["c"]


def test_nothing_is_there_before_it_is_committed_nor_after_a_failure(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="oops"),
        CheckpointWriter(tmp_path / "c", [9 * MIB]) as writer,
        writer.partition() as partition,
    ):
        partition.write(noise(3 * MIB))
        assert not (tmp_path / "c").exists()
        raise RuntimeError("oops")
    assert left(tmp_path) == []


def test_work_is_called_off_at_the_next_chunk(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    meter = Meter(9 * MIB, lambda done, total: seen.append((done, total)), lambda: len(seen) == 3)
    with pytest.raises(Cancelled):
        write(tmp_path / "c", noise(9 * MIB), meter=meter)
    assert seen == [(n * MIB, 9 * MIB) for n in (1, 2, 3)]
    assert left(tmp_path) == []


def test_a_refusal_at_the_end_leaves_what_was_there(tmp_path: Path) -> None:
    before = write(tmp_path / "c", noise(PAGE_BYTES, 1))

    def refuse(manifest: Manifest) -> None:
        raise Conflict(manifest.digest)

    with pytest.raises(Conflict), CheckpointWriter(tmp_path / "c", [0]) as writer:
        with writer.partition():
            pass
        writer.commit({}, approve=refuse)
    assert verify(tmp_path / "c", deep=True).manifest == before
    assert left(tmp_path) == ["c"]


def test_a_checkpoint_is_replaced_without_a_trace_of_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "c", noise(9 * MIB), noise(PAGE_BYTES), **{"old.json": b"{}"})
    with open(tmp_path / "c" / "partition-000.bin", "rb") as reader:
        new = write(tmp_path / "c", noise(PAGE_BYTES, 7))
        assert reader.read() == noise(9 * MIB)  # it is not disturbed
    assert left(tmp_path / "c") == ["manifest.json", "partition-000.bin"]
    assert verify(tmp_path / "c", deep=True).manifest == new
    assert left(tmp_path) == ["c"]


@pytest.mark.parametrize("there", ["file", "folder", "checkpoint and more", "partition only"])
def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path, there: str) -> None:
    path = tmp_path / "c"
    match there:
        case "file":
            path.write_text("precious")
        case "folder":
            (path / "precious").mkdir(parents=True)
        case "checkpoint and more":
            write(path, b"")
            (path / "precious.txt").write_text("precious")
        case "partition only":
            path.mkdir()
            (path / "partition-000.bin").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Conflict, match="is there"):
        write(path, noise(PAGE_BYTES))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    write(tmp_path / "c", b"")
    with (tmp_path / "c" / "manifest.json").open("ab") as manifest:
        manifest.write(b"damage")
    (tmp_path / "empty").mkdir()
    for name in ("c", "empty"):
        write(tmp_path / name, noise(PAGE_BYTES))
        verify(tmp_path / name)


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "c", b"")
    (tmp_path / "c").symlink_to("disk/c")
    new = write(tmp_path / "c", noise(PAGE_BYTES))
    assert (tmp_path / "c").is_symlink()
    assert read_manifest(tmp_path / "disk" / "c") == new


def test_a_destination_without_its_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        write(tmp_path / "nowhere" / "c", b"")


def test_a_folder_that_may_not_be_written_is_said_so() -> None:
    with pytest.raises(SllmError, match="cannot write /proc/c"):
        write(Path("/proc/c"), b"")


def test_what_a_crash_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".sllm-tmp-0123456789ab", tmp_path / ".sllm-tmp-ba9876543210"
    alien = tmp_path / ".tmp-0123456789ab"  # another program's: the parent may be somebody's home folder
    for folder in (dead, alive, alien):
        folder.mkdir()
        (folder / "part").write_text("x")
        (folder / ".sllm-writer").touch()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    write(tmp_path / "c", b"")
    assert left(tmp_path) == [alive.name, alien.name, "c"]
    os.close(lock)
    write(tmp_path / "c", b"")
    assert left(tmp_path) == [alien.name, "c"]


# --- other processes: races, deaths, full disks ---------------------------------------------------

PROLOGUE = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_writing import *
"""


def start(code: str, *args: object, failpoint: str = "", prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = {**os.environ, "SLLM_FAILPOINT": failpoint}
    command = [*prefix, sys.executable, "-c", PROLOGUE + code, *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=100)
    return process.returncode, output


# name -> whether the new checkpoint is there after a death at it
FAILPOINTS = {
    "write-begun": False,
    "write-allocated": False,
    "write-chunk": False,
    "write-partition": False,
    "write-files": False,
    "write-manifest": False,
    "write-synced": False,
    "write-renamed": True,
}
REPLACE = "write(Path(sys.argv[1]), noise(3 * MIB, 2), noise(PAGE_BYTES), **{'new.json': b'{}'})"


@pytest.mark.parametrize(("failpoint", "there"), FAILPOINTS.items())
@pytest.mark.parametrize("replaces", [False, True])
def test_a_death_at_any_point_leaves_the_old_or_the_new_and_what_it_leaves_is_removed(
    tmp_path: Path, failpoint: str, there: bool, replaces: bool
) -> None:
    path = tmp_path / "c"
    old = write(path, noise(9 * MIB, 1), **{"old.json": b"{}"}) if replaces else None
    new = write(None, noise(3 * MIB, 2), noise(PAGE_BYTES), **{"new.json": b"{}"})
    code, _ = ended(start(REPLACE, path, failpoint=failpoint))
    assert code == -signal.SIGKILL
    expected = new if there else old
    if expected is None:
        assert not path.exists()
    else:
        assert verify(path, deep=True).manifest == expected
    again = write(path, noise(PAGE_BYTES, 3))
    assert verify(path, deep=True).manifest == again
    assert left(tmp_path) == ["c"]


def test_every_failpoint_of_writing_is_tried() -> None:
    loader = Path(sys.modules[CheckpointWriter.__module__].__file__ or "").parent
    text = "".join(path.read_text() for path in loader.glob("*.py"))
    named = {part.split('"')[0] for part in text.split('failpoint("')[1:]}
    assert {name for name in named if name.startswith("write-")} == set(FAILPOINTS)


RACE = """
sys.stdin.readline()
for round in range(12):
    try:
        write(Path(sys.argv[1]), noise(PAGE_BYTES * (round + 1), int(sys.argv[2])))
    except Conflict:
        raise SystemExit("a rival's checkpoint was taken for something else")
"""


def test_processes_that_write_one_path_leave_one_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c"
    writers = [start(RACE, path, seed) for seed in (1, 2, 3)]
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():  # once it is there, it is there at all times, and whole
            seen.add(read_manifest(path).digest)
    assert [ended(writer)[0] for writer in writers] == [0, 0, 0]
    last = verify(path, deep=True).manifest
    assert last.digest in {write(None, noise(PAGE_BYTES * 12, seed)).digest for seed in (1, 2, 3)}
    assert len(seen) > 1
    assert left(tmp_path) == ["c"]


FULL = """
import subprocess
from traceback import extract_tb
from sllm.errors import CapacityExceeded
disk, option = Path(sys.argv[1]), sys.argv[2]
for amount in map(int, sys.argv[3:]):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{option}={amount}", "tmpfs", disk], check=True)
    try:
        write(disk / "c", noise(2 * MIB), noise(PAGE_BYTES), **{"a.json": noise(40000)})
        verify(disk / "c", deep=True)
        print("written")
    except CapacityExceeded as error:
        assert left(disk) == [], left(disk)
        steps = [frame.name for frame in extract_tb(error.__traceback__)]
        print("full:", *(step for step in ("partition", "add_file", "commit") if step in steps))
    finally:
        subprocess.run(["umount", disk], check=True)
"""


@pytest.fixture
def own_mounts() -> Iterator[tuple[str, ...]]:
    """Return what a command begins with to mount for itself alone."""
    prefix = ("unshare", "--mount", "--map-root-user") if os.geteuid() else ("unshare", "--mount")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount for himself")
    return prefix


@pytest.mark.parametrize(
    ("option", "amounts"),
    [
        ("size", [*range(4096, 40960, 8192), 1 << 20, 2 << 20, *range((2 << 20) + 4096, (2 << 20) + 90112, 8192)]),
        ("nr_inodes", range(2, 9)),
    ],
)
def test_a_disk_that_is_full_at_any_point_is_said_so_and_nothing_is_left(
    tmp_path: Path, own_mounts: tuple[str, ...], option: str, amounts: list[int]
) -> None:
    code, output = ended(start(FULL, tmp_path, option, *amounts, prefix=own_mounts))
    assert code == 0
    results = output.splitlines()
    assert len(results) == len(amounts)
    assert results[-1] == "written"
    assert [result == "written" for result in results] == sorted(result == "written" for result in results)
    assert {"full: partition", "full: add_file", "full: commit"} <= set(results)
