"""What is said of a checkpoint's files that cannot be opened: only what is known of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from loader.descriptors import descriptors

from sllm.errors import (
    CheckpointUnreadable,
    ExecutionFileDamaged,
    InvalidArgument,
    ManifestCorrupt,
    ManifestMissing,
    PartitionMissing,
    SllmError,
)
from sllm.loader import load, save, verify
from sllm.loader.conversion import convert
from sllm.loader.folder import cannot_read, check_sizes, open_regular, read_manifest
from sllm.loader.storage.direct import DirectFile

NOBODY = 65534


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    convert(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("path", ["", "a\0b", b"bytes", Path("a\0b")], ids=repr)
@pytest.mark.parametrize(
    "call",
    [load, verify, lambda path: save({}, path), lambda path: convert(path, "made"), lambda path: convert(".", path)],
    ids=["load", "verify", "save", "convert from", "convert to"],
)
def test_what_is_no_path_is_refused_by_the_whole_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[object], object], path: object
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument, match="no path of a folder|an empty path is no folder"):
        call(path)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_may_be_asked_for_by_its_digest(checkpoint: Path) -> None:
    found = read_manifest(checkpoint)
    assert read_manifest(checkpoint, digest=found.digest) == found
    with pytest.raises(ManifestCorrupt, match=f"{found.digest}, not sha256:0"):
        read_manifest(checkpoint, digest="sha256:0")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOENT, PartitionMissing),
        (errno.ENOTDIR, PartitionMissing),
        (errno.ELOOP, PartitionMissing),
        (errno.ENXIO, PartitionMissing),
        (errno.EIO, CheckpointUnreadable),
        (errno.EACCES, CheckpointUnreadable),
        (errno.ESTALE, CheckpointUnreadable),
        (errno.EMFILE, SllmError),
        (errno.ENFILE, SllmError),
        (errno.ENOMEM, SllmError),
    ],
)
def test_a_file_is_missing_only_if_it_is_not_there(number: int, expected: type[SllmError]) -> None:
    error = cannot_read("/c/partition-000.bin", OSError(number, os.strerror(number)), PartitionMissing)
    assert type(error) is expected
    assert error.message == f"cannot read /c/partition-000.bin: {os.strerror(number)}"
    assert error.hint


READERS: dict[str, Callable[[Path], object]] = {
    "the manifest": read_manifest,
    "a partition": lambda folder: DirectFile(folder / "partition-000.bin", 4096),
    "an execution file": lambda folder: open_regular(folder / "config.json", ExecutionFileDamaged),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_a_process_without_descriptors_says_nothing_against_a_checkpoint(
    checkpoint: Path, read: Callable[[Path], object]
) -> None:
    with descriptors(0), pytest.raises(SllmError, match="Too many open files") as raised:
        read(checkpoint)
    assert type(raised.value) is SllmError


def test_files_that_may_not_be_read_are_unreadable_and_not_missing(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    readers = [*READERS.values(), lambda folder: check_sizes(folder, manifest)]
    checkpoint.chmod(0)
    with ExitStack() as undo:
        undo.callback(checkpoint.chmod, 0o700)
        if os.geteuid() == 0:  # who may read everything
            undo.callback(os.seteuid, 0)
            os.seteuid(NOBODY)
        for read in readers:
            with pytest.raises(CheckpointUnreadable, match="Permission denied") as raised:
                read(checkpoint)
            assert "let this user read" in raised.value.hint


def test_what_is_not_there_is_said_to_be_missing(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(ExecutionFileDamaged):
        check_sizes(checkpoint, manifest)
    (checkpoint / "partition-000.bin").unlink()
    with pytest.raises(PartitionMissing):
        check_sizes(checkpoint, manifest)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(ManifestMissing):
        read_manifest(checkpoint)
