"""What a reading pipeline asks of a place where a partition is stored."""

from __future__ import annotations

from typing import Protocol


class PartitionBytes(Protocol):
    """The bytes of one partition. Several threads read at once."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def size_bytes(self) -> int: ...

    def read_into(self, view: memoryview, offset: int, *, fresh: bool = False) -> int:
        """Read some bytes from `offset` into the beginning of `view`; return how many: 0 only at the end.

        `fresh` goes past every cache, to see whether bytes that are wrong are wrong on the disk. Raises OSError.
        """

    def close(self) -> None: ...
