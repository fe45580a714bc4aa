"""A checkpoint's folder: opens what lies in it, and says what is missing. Reads; needs no torch."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from sllm.errors import (
    CheckpointUnreadable,
    ExecutionFileDamaged,
    InvalidArgument,
    InvalidCheckpoint,
    ManifestCorrupt,
    ManifestMalformed,
    ManifestMissing,
    PartitionMissing,
    PartitionTruncated,
    SllmError,
)
from sllm.loader.format import MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse

_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM)
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # this process, or the machine, has no more: says nothing of a file


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that a caller gave. Raises InvalidArgument for what can be none, and for "", which
    would be the working directory."""
    text = os.fspath(path)
    if not isinstance(text, str) or "\0" in text:
        raise InvalidArgument(f"{path!r} is no path of a folder")
    if not text:
        raise InvalidArgument("an empty path is no folder", hint="name one; `.` is the working directory")
    return Path(text)


def read_manifest(folder: Path, *, digest: str = "") -> Manifest:
    """Read and check `folder/manifest.json`; nothing is said of the other files. `digest`, if given, must be its own.

    Raises ManifestMissing, CheckpointUnreadable, ManifestCorrupt, and what `format.parse` raises; SllmError where the
    machine has no descriptor for it.
    """
    path = folder / MANIFEST
    fd = open_regular(path, ManifestMissing)
    with os.fdopen(fd, "rb") as file:
        size_bytes = os.fstat(fd).st_size
        if size_bytes > MAX_MANIFEST_BYTES:
            raise ManifestMalformed(f"{path} has {size_bytes} bytes, more than {MAX_MANIFEST_BYTES}")
        try:
            manifest = parse(file.read())
        except OSError as error:
            raise cannot_read(path, error, ManifestMissing) from error
    if digest and manifest.digest != digest:
        raise ManifestCorrupt(f"{path} is another than the one that is meant: {manifest.digest}, not {digest}")
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that all files are there, regular and as long as the manifest says; their bytes are not read.

    Raises PartitionMissing, PartitionTruncated, ExecutionFileDamaged, CheckpointUnreadable.
    """
    for partition in manifest.partitions:
        found = _size(folder / partition.file, PartitionMissing)
        if found != partition.size_bytes:
            raise PartitionTruncated(f"{folder / partition.file} has {found} bytes, not {partition.size_bytes}")
    for file in manifest.execution_files:
        found = _size(folder / file.path, ExecutionFileDamaged)
        if found != file.size_bytes:
            raise ExecutionFileDamaged(f"{folder / file.path} has {found} bytes, not {file.size_bytes}")


def open_regular(path: Path, missing: type[InvalidCheckpoint] = InvalidCheckpoint) -> int:
    """Open a file that must be a regular one, never through a link; O_NONBLOCK, so that a pipe in its place cannot
    hang the caller. Raises `missing` if there is none, and as `cannot_read` says."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise cannot_read(path, error, missing) from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise missing(f"{path} is not a regular file")


def cannot_read(path: object, error: OSError, missing: type[InvalidCheckpoint]) -> SllmError:
    """Return what an error of the operating system says of a file: `missing` only if there is none, a plain SllmError
    if it says nothing of the file (a copy on disk must not count as damaged for it), else CheckpointUnreadable."""
    message = f"cannot read {path}: {error.strerror}"
    if is_ours(error):
        return SllmError(message, hint="the machine, or this process, is out of descriptors or memory: ulimit -n")
    if error.errno in _NO_FILE:
        return missing(message)
    return CheckpointUnreadable(message, hint=f"let this user read {path}" if error.errno in _NOT_ALLOWED else "")


def is_ours(error: OSError) -> bool:
    """True if what failed would have failed for any file: no descriptors or no memory are left."""
    return error.errno in _OURS


def _size(path: Path, missing: type[InvalidCheckpoint]) -> int:
    try:
        status = os.lstat(path)
    except OSError as error:
        raise cannot_read(path, error, missing) from error
    if not stat.S_ISREG(status.st_mode):
        raise missing(f"{path} is not a regular file")
    return status.st_size
