"""Where the partitions of a checkpoint go in one piece of memory, and how wide a ring may be. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from sllm.errors import CapacityExceeded
from sllm.loader.format import Manifest, Partition

RING_BYTES = 128 << 20  # what staging for a device takes: enough chunks for all threads, and soon filled


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A partition that goes to byte `start` of the memory."""

    start: int
    partition: Partition


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """All partitions, one behind the other, in `size_bytes`. Each begins at a page: lengths are whole pages."""

    parts: tuple[Part, ...]
    size_bytes: int
    chunk_bytes: int

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(part.start for part in self.parts)


def arrange(manifest: Manifest) -> Arrangement:
    """Return where a whole checkpoint goes."""
    parts: list[Part] = []
    end = 0
    for partition in manifest.partitions:
        parts.append(Part(start=end, partition=partition))
        end += partition.size_bytes
    return Arrangement(parts=tuple(parts), size_bytes=end, chunk_bytes=manifest.chunk_bytes)


def ring_slots(arrangement: Arrangement, room_bytes: int) -> int:
    """Return how many chunks the ring may have that a load for a device goes through, with so much room.

    Raises CapacityExceeded if not even two fit: one is read into while another is copied out.
    """
    longest = max((-(-part.partition.size_bytes // arrangement.chunk_bytes) for part in arrangement.parts), default=0)
    slots = min(longest, RING_BYTES // arrangement.chunk_bytes, room_bytes // arrangement.chunk_bytes)
    if slots < min(2, longest):
        raise CapacityExceeded(
            f"a load in chunks of {arrangement.chunk_bytes} bytes needs two of them; {room_bytes} bytes are free",
            hint="let go of tensors loaded before, or make a larger Pool",
        )
    return slots
