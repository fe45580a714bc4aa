"""A folder that is written beside its destination and takes its place in one step. Blocking.

A crash at any point leaves the destination as it was, or as it was meant to be. What it leaves beside it is a folder
`.sllm-tmp-<12 hexadecimal digits>` that nobody holds a flock on: the next writer there, or the store at its start,
removes it, if its mark (a file that is made first and deleted last) or its content says that it is a writer's. A
destination that exists is exchanged for the new folder and then deleted; readers that have its files open
keep them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from sllm.errors import Conflict, InvalidCheckpoint, NotFound, SllmError
from sllm.failpoints import failpoint
from sllm.loader.folder import open_regular, read_manifest
from sllm.loader.format import FORMAT, MANIFEST
from sllm.loader.untrusted import json_object

# What has this name is deleted, so it is one that nobody else gives: the parent may be somebody's home folder.
_TMP = re.compile(r"\.sllm-tmp-[0-9a-f]{12}")
_OURS = re.compile(r"manifest\.json|partition-[0-9]{3}\.bin")
_MARK = ".sllm-writer"  # an empty file: what has it, whatever else is in it, is a writer's to delete
_MAX_HEADER_BYTES = 1 << 20
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class WorkFolder:
    """Made with its lock held, in the folder of `destination`. End it by `publish` or `discard`, then `close`.

    `replace_anything`: whatever has the destination's name is deleted, a link too (not what it leads to); else only a
    checkpoint is. Raises NotFound if
    there is no such folder, Conflict if something is at the destination that stays, OSError.
    """

    def __init__(self, destination: Path, replace_anything: bool = False) -> None:
        if replace_anything:
            self.destination = Path(os.path.realpath(destination.parent), destination.name)
        else:  # a link to a checkpoint stays; what it leads to is replaced
            self.destination = Path(os.path.realpath(destination))
        if not self.destination.parent.is_dir():
            raise NotFound(f"folder {self.destination.parent} is not there")
        self._replace_anything = replace_anything
        self._check_replaceable()
        remove_leftovers(self.destination.parent)
        self.path, self._lock = _make_locked(self.destination.parent)
        failpoint("write-begun")

    def publish(self) -> None:
        """Give the folder its destination's name, durably, and delete what had it. Raises Conflict, OSError."""
        (self.path / _MARK).unlink()
        os.fsync(self._lock)
        failpoint("write-synced")
        replaced = self._take_place()
        failpoint("write-renamed")
        flush_folder(self.destination.parent)
        if replaced:
            remove_tree(replaced)

    def discard(self) -> None:
        """Delete the folder, if it was not published."""
        remove_tree(self.path)

    def close(self) -> None:
        """Give up the lock."""
        os.close(self._lock)

    def _check_replaceable(self) -> None:
        if not self._replace_anything:
            check_replaceable(self.destination)

    def _take_place(self) -> Path | None:
        """Rename; return where what had the name is now."""
        while True:
            try:
                _rename(self.path, self.destination, _RENAME_NOREPLACE)
                return None
            except FileExistsError:
                self._check_replaceable()
            try:
                _rename(self.path, self.destination, _RENAME_EXCHANGE)
                return self.path
            except FileNotFoundError:
                continue  # it was removed just now


def remove_leftovers(parent: Path, *, anything: bool = False) -> None:
    """Delete the work folders in `parent` whose writers are gone: those that are certainly a writer's, or `anything` by
    such a name, where nobody else writes. What cannot be deleted stays."""
    for entry in list(os.scandir(parent)):
        if _TMP.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            _remove_if_left(Path(entry.path), anything)


def remove_tree(path: Path) -> None:
    """Delete whatever is at `path`; what cannot be deleted stays. A crash half-way leaves its mark on the rest."""
    if path.is_dir() and not path.is_symlink():
        with suppress(OSError):
            (path / _MARK).touch()
            for name in set(os.listdir(path)) - {_MARK}:
                _remove(path / name)
    _remove(path)


def temporary_name(parent: Path) -> Path:
    """Return a name in `parent` for what is to be deleted: after a crash it is a leftover."""
    return parent / f".sllm-tmp-{secrets.token_hex(6)}"


def check_replaceable(destination: Path) -> None:
    """Raise Conflict if something is there that is not ours to delete: a file, or a folder with more than a
    checkpoint in it."""
    try:
        names = set(os.listdir(destination))
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise Conflict(f"{destination} is there, and is no folder") from error
    alien = sorted(name for name in names - _execution_files(destination) if not _OURS.fullmatch(name))
    if alien or (names and not _has_manifest(destination)):
        what = f"it has {alien[0]!r}" if alien else f"it has no {MANIFEST} of format {FORMAT}"
        raise Conflict(
            f"{destination} is there, and is not only a checkpoint: {what}", hint="choose another name, or remove it"
        )


def flush_folder(path: Path) -> None:
    """Flush a folder's entries (a rename into it, say) to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _execution_files(folder: Path) -> set[str]:
    try:
        return {file.path for file in read_manifest(folder).execution_files}
    except InvalidCheckpoint:
        return set()


def _has_manifest(folder: Path) -> bool:
    """True if the manifest there says that it is one of ours, be it damaged."""
    try:
        with os.fdopen(open_regular(folder / MANIFEST), "rb") as file:
            header = file.readline(_MAX_HEADER_BYTES).rstrip(b",\n")
        return json_object(header + b"}", MANIFEST).get("format") == FORMAT
    except (SllmError, OSError):
        return False


def _is_writers(folder: Path) -> bool:
    """True if a writer made it: it has the mark, or is a whole checkpoint, or nothing yet."""
    with suppress(SllmError):
        if not (folder / _MARK).exists():
            check_replaceable(folder)
        return True
    return False


def _make_locked(parent: Path) -> tuple[Path, int]:
    """Return a new folder and the descriptor that holds its lock. Raises OSError."""
    while True:
        path = temporary_name(parent)
        path.mkdir()
        fd = _locked(path)
        if fd is not None:
            _mark(path, fd)
            return path, fd
        # Another writer took it for a leftover before we had the lock.


def _mark(path: Path, lock: int) -> None:
    """Mark a new folder, or leave nothing. Raises OSError."""
    try:
        (path / _MARK).touch()
    except OSError:
        remove_tree(path)
        os.close(lock)
        raise


def _remove_if_left(path: Path, anything: bool) -> None:
    with suppress(OSError):
        fd = _locked(path)
        if fd is not None:
            if anything or _is_writers(path):
                remove_tree(path)
            os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _locked(path: Path) -> int | None:
    """Return a descriptor with the lock of the folder at `path`; None if another has it, or the folder has gone.

    Raises OSError, where the file system has no locks for instance.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.lstat(path)):  # else it was published while we waited
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _rename(path: Path, destination: Path, flags: int) -> None:
    """renameat2(2). Where the file system lacks it, what is in the way is moved first: the one case in which a crash
    can leave the name free."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(destination), flags) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(destination))
    if flags == _RENAME_NOREPLACE and os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination))
    if flags == _RENAME_EXCHANGE:
        aside = temporary_name(path.parent)
        os.rename(destination, aside)
        os.rename(path, destination)
        os.rename(aside, path)
        return
    os.rename(path, destination)
