"""From a node's pool to a real GPU, as an engine host copies: `make test-gpu`. Not yet run."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sllm.loader
from sllm.core.grant import POOL_BLOCK_BYTES, Extent, Grant
from sllm.core.runtime_layout import CHECKPOINT, ENGINE, ENGINE_VERSION
from sllm.engine.feed import FeedReader
from sllm.engine.weights import Weights
from sllm.loader.folder import read_manifest
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.space import map_extents, reserve

torch = pytest.importorskip("torch")

from sllm.engine import device  # noqa: E402 - needs torch
from sllm.loader.memory import cuda  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@dataclass
class Leased:
    pool: SharedPool
    extents: tuple[Extent, ...]
    weights: Weights
    words: torch.Tensor


@pytest.fixture
def leased(tmp_path: Path) -> Iterator[Leased]:
    """A runtime layout of 40 MB in a pool, in blocks whose order is not that of the pool, and a lease on it, mapped."""
    words = torch.randint(0, 1 << 62, (5_000_000,))
    key = {CHECKPOINT: "c", ENGINE: "e", ENGINE_VERSION: "1"}
    sllm.loader.save({"w": words}, tmp_path / "runtime", layout="runtime", key=key)
    manifest = read_manifest(tmp_path / "runtime")
    content = (tmp_path / "runtime" / manifest.partitions[0].file).read_bytes()
    blocks = -(-len(content) // POOL_BLOCK_BYTES)
    extents = tuple(Extent(n * POOL_BLOCK_BYTES, POOL_BLOCK_BYTES) for n in reversed(range(blocks)))
    pool = SharedPool.create(blocks * POOL_BLOCK_BYTES, hugepages=False)
    for number, extent in enumerate(extents):
        piece = content[number * POOL_BLOCK_BYTES :][:POOL_BLOCK_BYTES]
        pool.view(extent.offset, len(piece))[:] = piece
    chunks = len(manifest.partitions[0].chunks)
    grant = Grant(
        digest=manifest.digest,
        partition=0,
        generation=1,
        size_bytes=len(content),
        chunk_bytes=manifest.chunk_bytes,
        extents=extents,
        slots=chunks,
        ready_chunks=chunks,
    )
    lease = pool.lease(extents)
    memory = map_extents(lease, extents, shared=True, writable=False)
    os.close(lease)
    ours, theirs = socket.socketpair()
    feed = FeedReader(grant, theirs)
    feed.follow(lambda share: None)
    weights = Weights(manifest=manifest, partition=0, memory=memory, feed=feed, is_shared=True, slots=chunks)
    del memory
    torch.cuda.init()
    yield Leased(pool, extents, weights, words)
    ours.close()


def test_a_partition_comes_to_the_device_whether_or_not_cuda_registers_the_pool(leased: Leased) -> None:
    with device.registered(leased.weights) as registration:
        assert registration is not None
        found = device.on_device(leased.weights, registration, torch.device("cuda", 0))
    assert torch.equal(found[: leased.words.nbytes].view(torch.int64).cpu(), leased.words)


def test_what_is_registered_does_not_outlive_its_release(leased: Leased) -> None:
    with device.registered(leased.weights) as registration:
        assert registration is not None
        registration.wait(leased.weights.size_bytes)
    assert leased.pool.leased(leased.extents)
    leased.weights.release()
    gc.collect()
    assert not leased.pool.leased(leased.extents)


def test_a_refusal_is_not_reported_by_what_comes_next() -> None:
    with pytest.warns(RuntimeWarning, match="cudaHostRegister"):
        assert not cuda.register(reserve(1 << 20))  # addresses without memory
    assert torch.ones(4, device="cuda").sum().item() == 4.0


def test_chunks_come_by_way_of_staging_memory() -> None:
    source = memoryview(bytearray(os.urandom(5_000_000)))
    target = torch.empty(len(source), dtype=torch.uint8, device="cuda")
    copier = cuda.StagedCopier(cuda.CudaCopier(target, torch.device("cuda", 0)), chunk_bytes=1 << 20, slots=1)
    for start in range(0, len(source), 1 << 20):
        copier.begin(source[start : start + (1 << 20)], start)
        copier.end_oldest()
    copier.close()
    assert bytes(target.cpu().tolist()) == bytes(source)
