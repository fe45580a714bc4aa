"""Grants as the agent sees them: what it reports of the pool, and what it does with bad news."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.agent.store.client import Died, Granted, Wanted
from sllm.agent.store.fake import FakeStore
from sllm.agent.store.protocol import Damaged
from sllm.agent.weights import Weights
from sllm.core.priority import Priority
from sllm.core.residency import ResidencyState, Tier
from sllm.core.runtime_layout import CHECKPOINT
from sllm.errors import ChunkCorrupt, InvalidCheckpoint, NotFound, PartitionTruncated
from sllm.loader.format import PAGE_BYTES, Tensor
from sllm.loader.writing import CheckpointWriter

MakeNode = Callable[..., Any]
MakeModel = Callable[..., Path]


async def fed(feed_fd: int) -> list[bytes]:
    """Return all that a feed says."""
    said, loop = [], asyncio.get_running_loop()
    with socket.socket(fileno=os.dup(feed_fd)) as feed:
        feed.setblocking(False)
        while packet := await loop.sock_recv(feed, 4096):
            said.append(packet)
    return said


async def loaded(node: Any, digest: str) -> None:
    """Load a checkpoint, and let it go."""
    async with node.local.weights.granted(node.local.store.with_digest(digest)) as granted:
        await fed(granted.feed_fd)


def residency(node: Any, tier: Tier) -> list[ResidencyState]:
    return [each.state for each in node.local.report("127.0.0.1:1").residencies if each.tier is tier]


async def test_a_grant_shows_the_weights_and_ends_with_its_context(make_node: MakeNode, model: Path) -> None:
    node = make_node()
    stored = node.local.store.with_digest(await node.add(model))
    async with node.local.weights.granted(stored) as granted:
        await fed(granted.feed_fd)
        grant = granted.grant
        assert (grant.digest, grant.size_bytes) == (stored.manifest.digest, stored.manifest.tensor_bytes)
        data = b"".join(os.pread(granted.lease_fd, e.size_bytes, e.offset) for e in grant.extents)
        assert data[: grant.size_bytes] == (node.local.store.folder(stored) / "partition-000.bin").read_bytes()
    for fd in (granted.lease_fd, granted.feed_fd):
        with pytest.raises(OSError):
            os.fstat(fd)


async def test_the_node_says_what_is_loading_and_what_is_in_memory(make_node: MakeNode, model: Path) -> None:
    node = make_node()
    stored = node.local.store.with_digest(await node.add(model))
    assert residency(node, Tier.DRAM) == []
    node.reading.hold()
    async with node.local.weights.granted(stored) as granted:
        await node.until(lambda: residency(node, Tier.DRAM) == [ResidencyState.LOADING])
        node.reading.go_on()
        await fed(granted.feed_fd)
    await node.until(lambda: residency(node, Tier.DRAM) == [ResidencyState.READY])
    usage = node.local.weights.usage
    assert (usage.tier, usage.capacity_bytes, usage.used_bytes) == (Tier.DRAM, 256 << 20, 8 << 20)


async def test_memory_that_a_host_has_of_a_checkpoint_that_is_gone_counts_as_used(
    make_node: MakeNode, model: Path
) -> None:
    node = make_node()
    digest = await node.add(model)
    async with node.local.weights.granted(node.local.store.with_digest(digest)) as granted:
        await fed(granted.feed_fd)
        node.local.weights.forget(digest)
        await node.until(lambda: node.local.weights.in_memory == () and node.store_process.kept_back_bytes)
        assert node.local.weights.usage.used_bytes == 8 << 20


async def test_each_load_is_reported_with_what_it_took(make_node: MakeNode, make_model: MakeModel, model: Path) -> None:
    node = make_node(dram_bytes=16 << 20)
    digests = [await node.add(model), await node.add(make_model("other", 5 << 20), "other")]
    for digest in (*digests, digests[0]):
        await loaded(node, digest)
    await node.until(lambda: len(node.local.weights.loads) == 2)
    loads = node.local.report("127.0.0.1:1").loads
    assert [(load.number, load.digest, load.tier) for load in loads] == [
        (1, digests[0], Tier.SSD),
        (2, digests[1], Tier.SSD),
    ]
    assert all(load.read_s > 0 and load.queue_s >= 0 for load in loads)
    assert loads[0].size_bytes == node.local.store.with_digest(digests[0]).manifest.tensor_bytes


async def test_only_the_last_loads_are_kept_and_their_numbers_go_on(make_node: MakeNode, model: Path) -> None:
    node = make_node()
    digest = await node.add(model)
    for count in range(1, 19):
        await loaded(node, digest)
        node.local.weights.forget(digest)
        await node.until(lambda: node.local.weights.in_memory == ())
        await node.until(lambda count=count: node.local.weights.loads[-1].number == count)
    assert [load.number for load in node.local.weights.loads] == list(range(3, 19))


async def test_a_copy_whose_bytes_are_wrong_is_in_quarantine(make_node: MakeNode, model: Path) -> None:
    node = make_node()
    digest = await node.add(model)
    stored = node.local.store.with_digest(digest)
    with (node.local.store.folder(stored) / "partition-000.bin").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"x")
    async with node.local.weights.granted(stored) as granted:
        assert b"CHUNK_CORRUPT" in (await fed(granted.feed_fd))[-1]
    await node.until(lambda: residency(node, Tier.SSD) == [ResidencyState.QUARANTINED])
    with pytest.raises(InvalidCheckpoint, match="damaged"):
        node.local.store.with_digest(digest)
    await node.until(lambda: node.local.weights.in_memory == ())


async def test_of_two_copies_with_the_same_content_only_the_damaged_one_is_in_quarantine(
    make_node: MakeNode, model: Path
) -> None:
    node = make_node()
    digest = await node.add(model)
    assert await node.add(model, "twin") == digest
    stored = node.local.store.with_digest(digest)
    os.truncate(node.local.store.folder(stored) / "partition-000.bin", 5)
    async with node.local.weights.granted(stored) as granted:
        await fed(granted.feed_fd)
    await node.until(lambda: node.local.store.damaged())
    assert node.local.store.damaged() == (stored,)
    other = node.local.store.with_digest(digest)
    async with node.local.weights.granted(other) as granted:
        assert b"ready" in (await fed(granted.feed_fd))[-1]
    assert node.local.store.entries() == (other,)


async def test_bad_news_of_content_that_was_replaced_meanwhile_changes_nothing(
    make_node: MakeNode, model: Path
) -> None:
    node = make_node()
    digest = await node.add(model)
    layout = written_runtime(node, {CHECKPOINT: digest, "engine": "fake", "engine_version": "1"})
    for folder in (layout.folder, node.local.store.folder(node.local.store.with_digest(digest))):
        seen = node.local.changes.revision
        node.local.weights.damaged(Damaged(digest="sha256:another", folder=str(folder), message="damaged"))
        await node.local.changes.wait_beyond(seen)
    assert node.local.store.runtimes() == (layout,)
    assert node.local.store.damaged() == ()


async def test_what_cannot_be_read_at_all_is_an_error_for_all_who_wait(make_node: MakeNode, model: Path) -> None:
    node = make_node()
    stored = node.local.store.with_digest(await node.add(model))
    os.truncate(node.local.store.folder(stored) / "partition-000.bin", 5)

    async def ask() -> bytes:
        async with node.local.weights.granted(stored) as granted:
            return (await fed(granted.feed_fd))[-1]

    said = await asyncio.gather(ask(), ask())
    assert all(PartitionTruncated.reason.encode() in each for each in said)
    await node.until(lambda: residency(node, Tier.SSD) == [ResidencyState.QUARANTINED])


async def test_a_runtime_layout_counts_as_its_checkpoint_and_a_damaged_one_is_removed(
    make_node: MakeNode, model: Path
) -> None:
    node = make_node()
    digest = await node.add(model)
    key = {CHECKPOINT: digest, "engine": "fake", "engine_version": "1"}
    layout = written_runtime(node, key)
    async with node.local.weights.granted(layout) as granted:
        await fed(granted.feed_fd)
    await node.until(lambda: residency(node, Tier.DRAM) == [ResidencyState.READY])
    assert [held.digest for held in node.local.weights.in_memory] == [digest]
    node.local.weights.forget(digest)
    await node.until(lambda: node.local.weights.in_memory == ())
    os.truncate(layout.folder / "partition-000.bin", 5)
    async with node.local.weights.granted(layout) as granted:
        await fed(granted.feed_fd)
    await node.until(lambda: node.local.store.runtime(key) is None)
    assert residency(node, Tier.SSD) == [ResidencyState.READY]


def written_runtime(node: Any, key: dict[str, str]) -> Any:
    with CheckpointWriter(node.local.store.runtime_work(key, PAGE_BYTES), [PAGE_BYTES]) as writer:
        with writer.partition() as partition:
            partition.write(bytes(PAGE_BYTES))
        writer.commit({"w": Tensor(0, 0, PAGE_BYTES, "uint8", (PAGE_BYTES,), (1,))}, layout="runtime", key=key)
    return node.local.store.adopt_runtime(key)


async def test_a_prefetch_stays_in_memory_though_nobody_asked_yet(make_node: MakeNode, model: Path) -> None:
    node = make_node()
    digest = await node.add(model)
    node.local.weights.prefetch(node.local.store.with_digest(digest))
    await node.until(lambda: residency(node, Tier.DRAM) == [ResidencyState.READY])
    await loaded(node, digest)
    assert node.reading.opened == ["demo"]


async def test_a_prefetch_that_memory_cannot_hold_is_given_up(
    make_node: MakeNode, make_model: Callable[..., Path]
) -> None:
    node = make_node(dram_bytes=8 << 20)
    digest = await node.add(make_model("large", 40 << 20))
    node.local.weights.prefetch(node.local.store.with_digest(digest))
    await node.until(lambda: residency(node, Tier.DRAM) == [ResidencyState.LOADING])
    await node.until(lambda: residency(node, Tier.DRAM) == [])


class DyingStore(FakeStore):
    """Dies when it is asked, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Wanted] = []
        self.dies = asyncio.Event()

    async def client(self) -> Any:
        return self

    async def open(self, wanted: Wanted) -> Granted:
        self.asked.append(wanted)
        await self.dies.wait()
        raise Died("it died")

    def raise_to(self, checkpoint: str, priority: Priority) -> None:
        pass


async def test_a_store_process_that_is_asked_anew_hears_the_priority_of_by_then(
    make_node: MakeNode, model: Path
) -> None:
    node, dying = make_node(), DyingStore()
    digest = await node.add(model)
    weights = Weights(dying, node.local.store, lambda: None)
    load = weights.granted(node.local.store.with_digest(digest), priority=Priority.PREWARM)
    asking = asyncio.create_task(load.__aenter__())
    await asyncio.sleep(0)
    weights.raise_to("sha256:another", Priority.REQUEST)
    weights.raise_to(digest, Priority.PREFETCH)
    dying.dies.set()
    weights.raise_to(digest, Priority.REQUEST)
    with pytest.raises(Died):
        await asking
    assert [wanted.priority for wanted in dying.asked] == [Priority.PREWARM, Priority.REQUEST, Priority.REQUEST]
    await weights.close(stop=True)


async def test_a_checkpoint_that_is_removed_leaves_the_memory_too(make_node: MakeNode, model: Path) -> None:
    node = make_node()
    digest = await node.add(model)
    await loaded(node, digest)
    await node.local.checkpoints.remove("demo")
    await node.until(lambda: node.local.weights.in_memory == ())
    with pytest.raises(NotFound):
        node.local.store.with_digest(digest)


async def test_files_are_verified_with_progress_and_what_is_wrong_is_in_quarantine(
    make_node: MakeNode, model: Path
) -> None:
    node = make_node()
    stored = node.local.store.with_digest(await node.add(model))
    seen: list[tuple[int, int]] = []
    await node.local.weights.verify(stored, lambda *done: seen.append(done))
    assert seen[-1] == (stored.manifest.stored_bytes, stored.manifest.stored_bytes)
    with (node.local.store.folder(stored) / "partition-000.bin").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(ChunkCorrupt):
        await node.local.weights.verify(stored, lambda *done: None)
    await node.until(lambda: residency(node, Tier.SSD) == [ResidencyState.QUARANTINED])
