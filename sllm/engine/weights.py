"""A grant, mapped: one partition of a checkpoint as memory of this process, whose bytes may still be on their way.

A partition that is whole in the pool is mapped where it is: for a CPU privately (reading copies nothing, a write copies
a page and stays in this process), for a GPU as the pool's own pages, which this process cannot write and CUDA can know
(`memory/cuda.py`). One that streams through a ring is copied into private memory as it comes, but for a runtime layout
for a GPU, which goes there from the ring. Either way the memory is there (as addresses) before a byte of it has been
read, so that an engine can be built meanwhile.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from sllm.core.device import DeviceKind
from sllm.core.grant import Grant, chunks_in
from sllm.core.launch import Launch
from sllm.engine.feed import FeedReader
from sllm.errors import InvalidCheckpoint
from sllm.failpoints import failpoint
from sllm.loader.folder import read_manifest
from sllm.loader.format import Manifest, Tensor
from sllm.loader.memory.space import Space, anonymous, map_extents, populate

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Weights:
    """What an engine is built from. `memory` is the partition, from its first byte; None after `release`.

    Bytes may be read once `feed.wait` has returned for them. Whoever keeps a view of the memory keeps it mapped, and
    with it the lease. `is_shared`: the memory is the pool's own pages, and a write to it ends the process. `slots`:
    how many chunks it holds; fewer than the partition has in a ring, where chunk n is in place n % slots until
    `taken` says that it may go.
    """

    manifest: Manifest
    partition: int
    memory: Space | None
    feed: FeedReader
    is_shared: bool
    slots: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The partition's tensors, in load order."""
        every = self.manifest.tensors
        return {name: tensor for name, tensor in every.items() if tensor.partition == self.partition}

    @property
    def size_bytes(self) -> int:
        return self.manifest.partitions[self.partition].size_bytes

    def wait(self, tensor: Tensor) -> None:
        """Return once the tensor's bytes are there. Raises the error of the load."""
        self.feed.wait(tensor.offset + tensor.size_bytes)

    def wait_all(self) -> None:
        """As `wait`, for the whole partition."""
        self.feed.wait(self.size_bytes)

    @property
    def chunks(self) -> int:
        return chunks_in(self.size_bytes, self.manifest.chunk_bytes)

    def taken(self, chunks: int) -> None:
        """In a ring: the first `chunks` chunks have been copied out of it. Elsewhere nothing."""
        if self.slots < self.chunks:
            self.feed.taken(chunks)

    def release(self) -> None:
        """Let go of the memory: it is unmapped with the last view of it, at once if there is none."""
        self.memory = None


def open_weights(launch: Launch, lease_fd: int, feed_fd: int) -> Weights:
    """Map the grant of a launch, and prepare to follow its feed. Takes over both descriptors.

    The lease needs no descriptor: a mapping keeps its file open. Raises what `read_manifest` raises, InvalidCheckpoint
    if the folder's manifest is not that of the grant, OSError.
    """
    sock = socket.socket(fileno=feed_fd)
    is_shared = launch.device_kind == DeviceKind.CUDA
    try:
        manifest = _manifest(Path(launch.weights_dir), launch.grant)
        mapped = map_extents(lease_fd, launch.grant.extents, shared=is_shared, writable=not is_shared)
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(lease_fd)
    failpoint("host-mapped")
    grant = launch.grant
    copied = grant.is_ring and not (is_shared and manifest.layout == "runtime")
    memory, feed = _from_ring(grant, sock, mapped) if copied else (mapped, _where_it_is(grant, sock, mapped))
    return Weights(
        manifest=manifest,
        partition=grant.partition,
        memory=memory,
        feed=feed,
        is_shared=is_shared and not copied,
        slots=grant.chunks if copied else grant.slots,
    )


def _manifest(folder: Path, grant: Grant) -> Manifest:
    manifest = read_manifest(folder)
    partition = manifest.partitions[grant.partition] if grant.partition < len(manifest.partitions) else None
    found = (manifest.digest, manifest.chunk_bytes, partition and partition.size_bytes)
    if found != (grant.digest, grant.chunk_bytes, grant.size_bytes):
        raise InvalidCheckpoint(f"checkpoint {folder.name!r} is not the one whose weights were read")
    return manifest


def _where_it_is(grant: Grant, sock: socket.socket, mapped: Space) -> FeedReader:
    """Bytes are used where they are in the pool, or taken out of there by whoever uses them."""
    if grant.is_ring:
        return FeedReader(grant, sock)

    def settle(first: int, end: int) -> None:
        start = first * grant.chunk_bytes
        _present(mapped, start, min(end * grant.chunk_bytes, grant.size_bytes) - start)

    return FeedReader(grant, sock, settle=settle)


def _present(memory: Space, offset: int, size_bytes: int) -> None:
    """Map pages before the engine meets them: each would cost it a fault of its own. They come anyway if this fails."""
    try:
        populate(memory, write=False, offset=offset, size_bytes=size_bytes)
    except OSError as error:
        log.warning("weights are mapped page by page: %s", error.strerror)


def _from_ring(grant: Grant, sock: socket.socket, ring: Space) -> tuple[Space, FeedReader]:
    memory = anonymous(grant.size_bytes)
    # In a list, so that the ring's mapping (and the lease) goes with its last chunk.
    rings = [ring]

    def arrive(first: int, end: int) -> None:
        for chunk in range(first, end):
            _copy_chunk(grant, chunk, rings[0], memory)
            feed.advance(chunk + 1)
            feed.taken(chunk + 1)
        if end == grant.chunks:
            rings.clear()

    feed = FeedReader(grant, sock, arrive=arrive)
    return memory, feed


def _copy_chunk(grant: Grant, chunk: int, ring: Space, memory: Space) -> None:
    """Without the GIL: `memmove` of ctypes gives it up, a slice assignment would not."""
    start = chunk * grant.chunk_bytes
    length = min(grant.chunk_bytes, grant.size_bytes - start)
    ctypes.memmove(memory.address + start, ring.address + chunk % grant.slots * grant.chunk_bytes, length)
