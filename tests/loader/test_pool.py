"""The DRAM pool's book-keeping, and the regions it holds."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sllm.errors import Cancelled, CapacityExceeded, InvalidCheckpoint
from sllm.loader.manifest import ALIGNMENT, layout
from sllm.loader.memory import region
from sllm.loader.memory.pool import Pool, Region
from sllm.loader.source import examine


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(100, lambda: 1000)
    yield pool
    pool.close()


def filled(pool: Pool, digest: str, size_bytes: int, now: float = 0.0) -> Region:
    held = pool.reserve(digest, (), size_bytes, now)
    held.ready = True
    return held


def test_keeps_what_is_ready_until_room_is_needed(pool: Pool) -> None:
    pool.unpin(filled(pool, "a", 60), 1.0)
    assert pool.find("a") is not None
    pool.unpin(filled(pool, "b", 60), 2.0)
    assert pool.find("a") is None
    assert pool.used_bytes == 60


def test_what_is_pinned_stays_and_the_next_is_held_beyond_the_budget_while_it_is_used(pool: Pool) -> None:
    first = filled(pool, "a", 60)
    second = filled(pool, "b", 60)
    assert (first.kept, second.kept) == (True, False)
    pool.unpin(second, 1.0)
    assert pool.find("b") is None
    pool.unpin(first, 1.0)
    assert pool.find("a") is first


def test_a_checkpoint_larger_than_the_pool_is_held_while_it_is_used(pool: Pool) -> None:
    held = filled(pool, "big", 500)
    assert pool.find("big") is held
    pool.unpin(held, 1.0)
    assert pool.regions() == ()


def test_a_region_that_was_never_filled_is_let_go(pool: Pool) -> None:
    pool.unpin(pool.reserve("a", (), 10, 0.0), 0.0)
    assert pool.regions() == ()


def test_refuses_what_the_machine_cannot_give(pool: Pool) -> None:
    with pytest.raises(CapacityExceeded, match="needs 1001 bytes of memory, the node has 1000"):
        pool.reserve("a", (), 1001, 0.0)


def test_a_region_holds_every_tensor_at_its_place_and_is_sealed(sharded: Path) -> None:
    source = examine(sharded)
    entries, size_bytes = layout(source.tensors)
    fd = region.create("test", size_bytes)
    done: list[int] = []
    chunks = tuple(region.reads(source.tensors, entries))
    region.fill(fd, sharded, chunks, progress=done.append, cancelled=lambda: False)
    for tensor, entry in zip(source.tensors, entries, strict=True):
        data = (sharded / tensor.shard).read_bytes()[tensor.offset : tensor.offset + tensor.size_bytes]
        assert os.pread(fd, entry.size_bytes, entry.offset) == data
        assert entry.offset % ALIGNMENT == 0
    assert done[-1] == sum(tensor.size_bytes for tensor in source.tensors)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


def test_a_fill_can_be_cancelled_and_notices_a_shard_that_shrank(model: Path) -> None:
    source = examine(model)
    entries, size_bytes = layout(source.tensors)
    chunks = tuple(region.reads(source.tensors, entries))
    fd = region.create("test", size_bytes)
    with pytest.raises(Cancelled):
        region.fill(fd, model, chunks, progress=lambda _: None, cancelled=lambda: True)
    (model / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InvalidCheckpoint, match="shorter"):
        region.fill(fd, model, chunks, progress=lambda _: None, cancelled=lambda: False)
    os.close(fd)


def test_long_tensors_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(region, "CHUNK_BYTES", 10)
    source = examine(model)
    entries, _ = layout(source.tensors)
    chunks = [chunk for chunk in region.reads(source.tensors, entries) if chunk.offset < 32]
    assert [chunk.size_bytes for chunk in chunks] == [10, 10, 10, 2]
