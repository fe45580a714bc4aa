"""A checkpoint's folder: opens what lies in it, and says what is missing. Reads; needs no torch."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from sllm.errors import (
    CheckpointUnreadable,
    ExecutionFileDamaged,
    InvalidCheckpoint,
    ManifestMalformed,
    ManifestMissing,
    PartitionMissing,
    PartitionTruncated,
    SllmError,
)
from sllm.loader.format import MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse

_OUR_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # says nothing of the file


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`; nothing is said of the other files.

    Raises ManifestMissing, CheckpointUnreadable, and what `format.parse` raises.
    """
    fd = open_file(folder / MANIFEST, ManifestMissing)
    with os.fdopen(fd, "rb") as file:
        size_bytes = os.fstat(fd).st_size
        if size_bytes > MAX_MANIFEST_BYTES:
            raise ManifestMalformed(f"{folder / MANIFEST} has {size_bytes} bytes, more than {MAX_MANIFEST_BYTES}")
        try:
            return parse(file.read())
        except OSError as error:
            raise CheckpointUnreadable(f"cannot read {folder / MANIFEST}: {error.strerror}") from error


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that all files are there, regular and as long as the manifest says; their bytes are not read.

    Raises PartitionMissing, PartitionTruncated, ExecutionFileDamaged.
    """
    for partition in manifest.partitions:
        found = _size(folder / partition.file, PartitionMissing)
        if found != partition.size_bytes:
            raise PartitionTruncated(f"{folder / partition.file} has {found} bytes, not {partition.size_bytes}")
    for file in manifest.execution_files:
        found = _size(folder / file.path, ExecutionFileDamaged)
        if found != file.size_bytes:
            raise ExecutionFileDamaged(f"{folder / file.path} has {found} bytes, not {file.size_bytes}")


def _size(path: Path, missing: type[InvalidCheckpoint]) -> int:
    try:
        status = os.lstat(path)
    except OSError as error:
        raise missing(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise missing(f"{path} is not a regular file")
    return status.st_size


def open_regular(path: Path) -> int:
    """Open a file that must be a regular one; O_NONBLOCK, so that a pipe in its place cannot hang the caller."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _OUR_FAULT:
            raise SllmError(f"cannot read {path}: {error.strerror}", hint="raise the limit of open files") from error
        raise InvalidCheckpoint(f"cannot read {path}: {error.strerror}") from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise InvalidCheckpoint(f"{path} is not a regular file")


def open_file(path: Path, missing: type[InvalidCheckpoint]) -> int:
    """Open a regular file to read. Raises `missing`."""
    try:
        return open_regular(path)
    except InvalidCheckpoint as error:
        raise missing(error.message) from error
