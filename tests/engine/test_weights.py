"""A grant, mapped in this process: what is there when, from the pool or through a ring, and what ends a wait."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.core.launch import Launch
from sllm.engine.weights import Weights, open_weights
from sllm.errors import ChunkCorrupt, InvalidCheckpoint, ManifestMissing, SllmError, Unavailable

Make = Callable[..., Any]
CHUNK_BYTES = 1 << 20


class Waiting:
    """Waits for bytes in a thread of its own, as an engine does."""

    def __init__(self, weights: Weights, end: int) -> None:
        self.error: SllmError | None = None
        self._weights = weights
        self._end = end
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self._weights.feed.wait(self._end)
        except SllmError as error:
            self.error = error

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> SllmError | None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.error


class Shares:
    """What a feed tells of its progress."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, share: float) -> None:
        self.seen.append(share)


def content(weights: Weights, start: int, end: int) -> bytes:
    assert weights.memory is not None
    return bytes(weights.memory.view(start, end - start))


def test_what_is_resident_is_there_at_once(make_launch: Make, make_pool: Make) -> None:
    launch: Launch = make_launch()
    pool = make_pool(launch)
    weights = open_weights(launch, *pool.give())
    weights.feed.follow(Shares())
    weights.wait_all()
    assert content(weights, 0, weights.size_bytes) == pool.content
    assert list(weights.tensors) == ["w"]


def test_extents_that_do_not_follow_each_other_do_so_when_they_are_mapped(
    make_launch: Make, make_pool: Make, write_weights: Make, tmp_path: Path
) -> None:
    launch: Launch = make_launch(weights=write_weights(tmp_path / "large", 20 << 20))
    assert len(launch.grant.extents) == 3
    pool = make_pool(launch)
    weights = open_weights(launch, *pool.give())
    weights.feed.follow(Shares())
    weights.wait_all()
    assert content(weights, 0, weights.size_bytes) == pool.content


def test_a_wait_ends_with_its_own_last_byte_not_with_the_last_of_all(make_launch: Make, make_pool: Make) -> None:
    launch: Launch = make_launch(ready=0)
    pool, shares = make_pool(launch), Shares()
    weights = open_weights(launch, *pool.give())
    weights.feed.follow(shares)
    first, last = Waiting(weights, 10), Waiting(weights, weights.size_bytes)
    pool.read_to(1)
    assert first.end() is None
    assert last.waits
    assert content(weights, 0, CHUNK_BYTES) == pool.content[:CHUNK_BYTES]
    pool.read_to(3)
    assert last.end() is None
    assert content(weights, 0, weights.size_bytes) == pool.content
    assert shares.seen == sorted(shares.seen)
    assert shares.seen[-1] == 1.0


def test_a_partition_comes_through_a_ring_that_is_smaller(make_launch: Make, make_pool: Make) -> None:
    launch: Launch = make_launch(slots=1)
    pool = make_pool(launch)
    weights = open_weights(launch, *pool.give())
    weights.feed.follow(Shares())
    for chunk in range(launch.grant.chunks):
        pool.put(chunk, chunk + 1)
        pool.say({"ready": chunk + 1})
        assert pool.feed.recv(100) == b'{"taken": %d}' % (chunk + 1)
    weights.wait_all()
    assert content(weights, 0, weights.size_bytes) == pool.content
    assert pool.feed.recv(100) == b""  # it has closed its end
    assert not pool.is_leased


def test_a_load_that_fails_fails_whoever_waits_with_its_own_reason(make_launch: Make, make_pool: Make) -> None:
    launch: Launch = make_launch(ready=0)
    pool = make_pool(launch)
    weights = open_weights(launch, *pool.give())
    weights.feed.follow(Shares())
    waiting = Waiting(weights, weights.size_bytes)
    pool.read_to(1)
    pool.say({"error": "CHUNK_CORRUPT", "message": "chunk 1 of partition-000.bin is not what was written"})
    assert isinstance(waiting.end(), ChunkCorrupt)
    with pytest.raises(ChunkCorrupt, match="chunk 1"):
        weights.wait_all()
    weights.feed.wait(CHUNK_BYTES)  # what had come before is as good as ever


@pytest.mark.parametrize("ready", [0, 2])
def test_a_store_process_that_dies_in_the_middle_is_no_endless_wait(
    make_launch: Make, make_pool: Make, ready: int
) -> None:
    launch: Launch = make_launch(ready=ready)
    pool = make_pool(launch)
    weights = open_weights(launch, *pool.give())
    weights.feed.follow(Shares())
    waiting = Waiting(weights, weights.size_bytes)
    pool.close()
    assert isinstance(waiting.end(), Unavailable)


def test_the_lease_ends_with_the_last_view_of_the_memory(make_launch: Make, make_pool: Make) -> None:
    launch: Launch = make_launch()
    pool = make_pool(launch)
    weights = open_weights(launch, *pool.give())
    weights.feed.follow(Shares())
    weights.wait_all()
    assert pool.feed.recv(100) == b""  # the feed has ended, and holds no memory any more
    assert weights.memory is not None
    view = weights.memory.view(0, 10)
    weights.release()
    del weights
    gc.collect()
    assert pool.is_leased
    del view
    gc.collect()
    assert not pool.is_leased


def test_what_is_written_stays_in_this_process(make_launch: Make, make_pool: Make) -> None:
    launch: Launch = make_launch()
    pool = make_pool(launch)
    mine, other = open_weights(launch, *pool.give()), open_weights(launch, *make_pool(launch).give())
    for weights in (mine, other):
        weights.feed.follow(Shares())
        weights.wait_all()
    assert mine.memory is not None
    mine.memory.view(0, 4)[:] = b"mine"
    assert content(other, 0, 4) == pool.content[:4]


def test_a_manifest_that_is_not_that_of_the_grant_is_refused(
    make_launch: Make, make_pool: Make, write_weights: Make, tmp_path: Path
) -> None:
    launch: Launch = make_launch(weights_dir=str(write_weights(tmp_path / "other", 4096)))
    pool = make_pool(launch)
    with pytest.raises(InvalidCheckpoint, match="not the one"):
        open_weights(launch, *pool.give())
    gc.collect()
    assert not pool.is_leased
    gone: Launch = make_launch(weights_dir=str(tmp_path / "gone"))
    with pytest.raises(ManifestMissing):
        open_weights(gone, *make_pool(gone).give())


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("real.json")], ids=["pipe", "link"])
def test_what_is_no_file_is_no_manifest_and_nobody_waits_for_it(
    make_launch: Make, make_pool: Make, put: Callable[[Path], None]
) -> None:
    launch: Launch = make_launch()
    manifest = Path(launch.weights_dir) / "manifest.json"
    manifest.rename(manifest.with_name("real.json"))
    put(manifest)
    with pytest.raises(ManifestMissing):
        open_weights(launch, *make_pool(launch).give())
