"""Grant: a right to one partition of a checkpoint in its node's DRAM pool, and how its bytes are announced.

The store process makes it, the agent passes it on, an engine host uses it. Two descriptors go with it (SCM_RIGHTS):

- **lease**: an open file description of the pool, with a shared OFD lock on every extent. Whoever holds a copy of this
  descriptor pins the memory; the kernel lifts the pin with the last of them, whoever dies in which order. No message
  gives a lease back.
- **feed**: a SOCK_SEQPACKET socket, one JSON object per packet. The store process says `{"ready": N}` whenever N grows:
  the first N chunks are in memory and verified (N may skip); after the last one it closes. `{"error": REASON,
  "message": TEXT, "hint": TEXT}` ends a load that failed; an end without N = chunks means that the store process
  died. When every copy of the other end is closed before that, nobody wants the load any more, and it is called off.

In a ring (`slots < chunks`, for a partition that the pool has no room for) chunk n lies in slot n % slots; whoever
copies it out says `{"taken": N}` (the first N chunks are no longer needed), and the store process reads on.

This module only says what the messages hold; it opens nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

POOL_BLOCK_BYTES = 8 << 20  # a block, the unit of allocation in a pool: any chunk of I/O lies in one


class Extent(NamedTuple):
    """`size_bytes` bytes from `offset` of a pool. In the one that processes share, both are multiples of
    POOL_BLOCK_BYTES."""

    offset: int
    size_bytes: int


class Chunked:
    """A partition of `size_bytes` in memory that holds `slots` of its chunks, all of them or fewer."""

    __slots__ = ()

    size_bytes: int
    chunk_bytes: int
    slots: int

    @property
    def chunks(self) -> int:
        return chunks_in(self.size_bytes, self.chunk_bytes)

    @property
    def is_ring(self) -> bool:
        """True if chunks must be copied out as they come."""
        return self.slots < self.chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant(Chunked):
    """`size_bytes` is the partition's length, read in chunks of `chunk_bytes`. `extents`, one behind the other, hold
    it whole, or `slots` chunks of it. `ready_chunks` is the state at the time of the grant: `chunks` if there is
    nothing to wait for. `generation` tells this copy from an earlier one of the same content.
    """

    digest: str
    partition: int
    generation: int
    size_bytes: int
    chunk_bytes: int
    extents: tuple[Extent, ...]
    slots: int
    ready_chunks: int


def chunks_in(size_bytes: int, chunk_bytes: int) -> int:
    """Return how many chunks so many bytes take; the last may be shorter."""
    return -(-size_bytes // chunk_bytes)
