"""Partition files, read past the page cache (O_DIRECT)."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Self

from sllm.errors import PartitionMissing, PartitionTruncated
from sllm.loader.folder import cannot_read, is_ours, open_regular

_BLOCK_BYTES = 4096  # O_DIRECT wants offsets and lengths in whole blocks


class DirectFile:
    """A partition's file. Where O_DIRECT is refused it is read through the page cache and dropped there."""

    def __init__(self, path: str | os.PathLike[str], size_bytes: int) -> None:
        """Open it. Raises PartitionMissing, PartitionTruncated if it has not `size_bytes`, CheckpointUnreadable;
        SllmError where the machine has no descriptors for it."""
        self.name = os.fspath(path)
        self.size_bytes = size_bytes
        with contextlib.ExitStack() as undo:
            self._buffered = open_regular(Path(path), PartitionMissing)
            undo.callback(os.close, self._buffered)
            found = os.fstat(self._buffered).st_size
            if found != size_bytes:
                raise PartitionTruncated(f"{self.name} has {found} bytes, its manifest says {size_bytes}")
            self._direct: int | None = self._open_direct()
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, view: memoryview, offset: int, *, fresh: bool = False) -> int:
        direct = self._direct
        if direct is not None and offset % _BLOCK_BYTES == 0 and len(view) % _BLOCK_BYTES == 0:
            try:
                return os.preadv(direct, [view], offset)
            except OSError as error:
                # Larger blocks than ours, or memory that is not aligned: known only now.
                if error.errno != errno.EINVAL:
                    raise
        return self._read_buffered(view, offset, fresh)

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)

    def _read_buffered(self, view: memoryview, offset: int, fresh: bool) -> int:
        if fresh:
            os.posix_fadvise(self._buffered, offset, len(view), os.POSIX_FADV_DONTNEED)
        count = os.preadv(self._buffered, [view], offset)
        os.posix_fadvise(self._buffered, offset, len(view), os.POSIX_FADV_DONTNEED)
        return count

    def _open_direct(self) -> int | None:
        """Open the very file that was checked once more, for O_DIRECT; None where its file system has no such thing."""
        try:
            return os.open(f"/proc/self/fd/{self._buffered}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if is_ours(error):
                raise cannot_read(self.name, error, PartitionMissing) from error
            return None
