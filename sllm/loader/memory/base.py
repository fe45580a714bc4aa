"""What the pipeline asks of a device: to copy chunks into its memory, in order, while it does other things."""

from __future__ import annotations

from typing import Protocol


class DeviceCopier(Protocol):
    """Copies into one device's memory. Belongs to one thread. Copies end in the order in which they began."""

    def begin(self, source: memoryview, offset: int) -> None:
        """Begin to copy `source` to byte `offset` of the device's memory; `source` must stay as it is until the copy
        has ended. Raises SllmError."""

    def end_oldest(self) -> None:
        """Wait until the oldest copy that has not ended has. Raises SllmError if it failed."""

    def close(self) -> None:
        """Wait for what is under way, whatever becomes of it; never raises."""
