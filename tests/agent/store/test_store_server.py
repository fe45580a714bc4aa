"""What the store grants, shares, calls off and gives back. The server runs in this process, with a fake disk."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from agent.store.conftest import MIB, Feed, Made, Recorder, content_of, copied_out

from sllm.agent.store.client import StoreClient
from sllm.agent.store.server import Server
from sllm.core.grant import POOL_BLOCK_BYTES
from sllm.core.priority import Priority
from sllm.errors import (
    ChunkCorrupt,
    DeadlineExceeded,
    ManifestCorrupt,
    ManifestMalformed,
    ManifestMissing,
    PartitionMissing,
    PartitionTruncated,
    SllmError,
    Unavailable,
)
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import EntryState, Table

Make = Callable[..., Any]


async def test_a_load_is_granted_before_it_is_read_and_told_as_it_comes(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.hold(made)
    granted = await store.client.open(made.wanted())
    assert (granted.grant.ready_chunks, granted.grant.chunks, granted.grant.is_ring) == (0, 4, False)
    feed = Feed(granted)
    store.disk.free(made)
    messages = await feed.all()
    ready = [message["ready"] for message in messages]
    assert ready == sorted(ready)
    assert ready[-1] == 4
    assert content_of(granted) == made.data
    await store.recorder.until(lambda: store.recorder.loads)
    loaded = store.recorder.loads[0]
    assert (loaded.checkpoint, loaded.size_bytes) == (made.digest, len(made.data))
    assert loaded.read_s > 0
    assert [entry.state for entry in store.entries] == [EntryState.READY]
    os.close(granted.lease_fd)


async def test_what_is_there_is_granted_at_once_and_not_read_again(make_store: Make, make_checkpoint: Make) -> None:
    store, made = await make_store(), make_checkpoint()
    first = await store.load(made)
    reads = len(store.disk.sources["demo"].reads)
    second = await store.client.open(made.wanted())
    assert second.grant.ready_chunks == second.grant.chunks
    assert await Feed(second).all() == [{"ready": 4}]
    assert (second.grant.generation, second.grant.extents) == (first.grant.generation, first.grant.extents)
    assert len(store.disk.sources["demo"].reads) == reads
    assert [entry.uses for entry in store.entries] == [2]


async def test_two_who_want_the_same_share_one_read(make_store: Make, make_checkpoint: Make) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.hold(made)
    first = await store.client.open(made.wanted())
    second = await store.client.open(made.wanted())
    store.disk.free(made)
    feeds = await asyncio.gather(Feed(first).all(), Feed(second).all())
    assert [messages[-1] for messages in feeds] == [{"ready": 4}] * 2
    assert content_of(first) == content_of(second) == made.data
    assert len(store.disk.sources["demo"].reads) == 4
    await store.recorder.until(lambda: store.entries[0].state is EntryState.READY)
    await store.settled()
    assert len(store.recorder.loads) == 1


async def test_loads_go_one_at_a_time_by_priority_and_joining_raises_it(
    make_store: Make, make_checkpoint: Make
) -> None:
    store = await make_store(chunks=8)
    busy, fetched, warmed, asked = (make_checkpoint(name) for name in ("busy", "fetched", "warmed", "asked"))
    store.disk.hold(busy)
    running = await store.client.open(busy.wanted())
    await store.disk.until_read(busy)
    waiting = [
        store.begin(fetched, priority=Priority.PREFETCH),
        store.begin(warmed, priority=Priority.PREWARM),
        store.begin(asked),
        store.begin(fetched, priority=Priority.REQUEST),
    ]
    await store.settled()
    assert store.disk.opened == ["busy"]
    store.disk.free(busy)
    for granted in [running, *await asyncio.gather(*waiting)]:
        await Feed(granted).all()
        os.close(granted.lease_fd)
    assert store.disk.opened == ["busy", "fetched", "asked", "warmed"]


async def test_a_load_that_nobody_wants_any_more_is_called_off_and_its_memory_given_back(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.hold(made)
    granted = await store.client.open(made.wanted())
    await store.disk.until_read(made)
    granted.close()
    await store.settled()
    other = make_checkpoint("other")
    waiting = store.begin(other)
    store.disk.free(made)
    await Feed(await waiting).all()
    assert len(store.disk.sources["demo"].reads) == 1
    assert [entry.digest for entry in store.entries] == [other.digest]
    assert made.digest not in [damage.digest for damage in store.recorder.damages]


async def test_one_of_two_who_share_a_load_may_leave(make_store: Make, make_checkpoint: Make) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.hold(made)
    first, second = await store.client.open(made.wanted()), await store.client.open(made.wanted())
    first.close()
    await store.settled()
    store.disk.free(made)
    assert (await Feed(second).all())[-1] == {"ready": 4}


async def test_who_comes_while_a_load_is_called_off_gets_another(make_store: Make, make_checkpoint: Make) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.hold(made)
    granted = await store.client.open(made.wanted())
    await store.disk.until_read(made)
    granted.close()
    await store.settled()
    again = store.begin(made)
    await store.settled()
    store.disk.free(made)
    assert (await Feed(await again).all())[-1] == {"ready": 4}
    assert content_of(await again) == made.data


async def test_a_start_that_is_called_off_in_the_queue_is_never_read(make_store: Make, make_checkpoint: Make) -> None:
    store, busy, made = await make_store(), make_checkpoint("busy"), make_checkpoint()
    store.disk.hold(busy)
    running = await store.client.open(busy.wanted())
    waiting = store.begin(made)
    await store.disk.until_read(busy)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    last = store.begin(make_checkpoint("last"))
    await store.settled()
    store.disk.free(busy)
    await Feed(running).all()
    await Feed(await last).all()
    assert store.disk.opened == ["busy", "last"]


async def test_a_deadline_ends_the_wait_in_the_queue_and_the_load(make_store: Make, make_checkpoint: Make) -> None:
    store, busy, made = await make_store(), make_checkpoint("busy"), make_checkpoint()
    store.disk.hold(busy)
    running = await store.client.open(busy.wanted(deadline_s=0.2))
    with pytest.raises(DeadlineExceeded, match="not loaded within 0.1 s"):
        await store.client.open(made.wanted(deadline_s=0.1))
    messages = await Feed(running).all()
    assert messages[-1]["error"] == "DEADLINE_EXCEEDED"
    os.close(running.lease_fd)
    store.disk.free(busy)
    await store.recorder.until(lambda: not store.entries)


async def test_a_bad_chunk_reaches_all_who_wait_and_gives_the_memory_back(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.hold(made)
    store.disk.fail(made, flips={2 * MIB: 99})
    grants = [await store.client.open(made.wanted()) for _ in range(2)]
    store.disk.free(made)
    for granted in grants:
        last = (await Feed(granted).all())[-1]
        assert (last["error"], "chunk 2" in last["message"]) == ("CHUNK_CORRUPT", True)
        os.close(granted.lease_fd)
    await store.recorder.until(lambda: store.recorder.damages)
    damage = store.recorder.damages[0]
    assert (damage.digest, damage.folder, "chunk 2" in damage.message) == (made.digest, str(made.folder), True)
    await store.recorder.until(lambda: not store.entries)


async def test_a_bit_that_flips_once_on_the_way_is_read_again(make_store: Make, make_checkpoint: Make) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.fail(made, flips={2 * MIB: 1})
    assert content_of(await store.load(made)) == made.data
    assert not store.recorder.damages


async def test_a_disk_error_is_damage_too(make_store: Make, make_checkpoint: Make) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.fail(made, errors={MIB: OSError(errno.EIO, "Input/output error")})
    granted = await store.client.open(made.wanted())
    assert (await Feed(granted).all())[-1]["error"] == "CHECKPOINT_UNREADABLE"
    await store.recorder.until(lambda: store.recorder.damages)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda made: (made.folder / "manifest.json").unlink(), ManifestMissing),
        (lambda made: (made.folder / "manifest.json").write_bytes(b"{}"), ManifestMalformed),
        (lambda made: made.wanted(digest="sha256:0"), ManifestCorrupt),
        (lambda made: made.wanted(partition=1), PartitionMissing),
        (lambda made: made.wanted(partition=-1), PartitionMissing),
    ],
)
async def test_what_is_wrong_before_the_first_byte_is_the_answer(
    make_store: Make, make_checkpoint: Make, spoil: Callable[[Made], Any], expected: type[Exception]
) -> None:
    store, made = await make_store(), make_checkpoint()
    wanted = spoil(made)
    with pytest.raises(expected):
        await store.client.open(wanted if hasattr(wanted, "digest") else made.wanted())
    assert store.entries == []


async def test_a_full_pool_gives_up_what_nobody_uses_and_never_what_is_leased(
    make_store: Make, make_checkpoint: Make
) -> None:
    store = await make_store(chunks=2)
    first, second, third = (make_checkpoint(name) for name in ("first", "second", "third"))
    kept = await store.load(first)
    os.close((await store.load(second)).lease_fd)
    granted = await store.load(third)
    assert {entry.digest for entry in store.entries} == {first.digest, third.digest}
    assert content_of(kept) == first.data
    assert content_of(granted) == third.data


async def test_a_pool_that_is_all_leased_refuses_for_now(make_store: Make, make_checkpoint: Make) -> None:
    store = await make_store(chunks=1)
    lease = await store.load(make_checkpoint("first"))
    made = make_checkpoint()
    with pytest.raises(Unavailable, match=f"all {POOL_BLOCK_BYTES} bytes"):
        await store.client.open(made.wanted())
    os.close(lease.lease_fd)
    assert content_of(await store.load(made)) == made.data


async def test_a_checkpoint_larger_than_the_pool_streams_through_a_ring(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made = await make_store(chunks=2, threads=3), make_checkpoint(size_bytes=20 * MIB + 4096)
    granted = await store.client.open(made.wanted())
    assert (granted.grant.slots, granted.grant.chunks, granted.grant.is_ring) == (8, 21, True)
    feed = Feed(granted)
    assert await copied_out(granted, feed) == made.data
    assert await feed.next() is None
    await store.recorder.until(lambda: store.recorder.loads and not store.entries)


async def test_each_reader_of_a_ring_has_its_own(make_store: Make, make_checkpoint: Make) -> None:
    store, made = await make_store(chunks=2), make_checkpoint(size_bytes=20 * MIB)
    first, second = store.begin(made), store.begin(made)

    async def read(asked: asyncio.Task[Any]) -> bytes:
        granted = await asked
        feed = Feed(granted)
        data = await copied_out(granted, feed)
        os.close(granted.lease_fd)
        return data

    assert await asyncio.gather(read(first), read(second)) == [made.data] * 2


async def test_a_reader_of_a_ring_that_takes_nothing_holds_nobody_up(make_store: Make, make_checkpoint: Make) -> None:
    store, large, made = await make_store(chunks=2), make_checkpoint("large", 20 * MIB), make_checkpoint()
    slow = await store.client.open(large.wanted())
    assert content_of(await store.load(made)) == made.data
    feed = Feed(slow)
    assert await copied_out(slow, feed) == large.data


async def test_a_slow_disk_is_not_taken_for_a_slow_reader(make_store: Make, make_checkpoint: Make) -> None:
    store, large, made = await make_store(chunks=2), make_checkpoint("large", 20 * MIB), make_checkpoint()
    store.disk.hold(large)
    slow = await store.client.open(large.wanted())
    waiting = store.begin(made)
    assert (await asyncio.wait([waiting], timeout=2.5))[1] == {waiting}  # longer than a reader is waited for
    store.disk.free(large)
    feed = Feed(slow)
    assert await copied_out(slow, feed) == large.data
    assert (await Feed(await waiting).all())[-1] == {"ready": 4}


async def test_a_reader_of_a_ring_cannot_have_chunks_overwritten_that_never_came(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made = await make_store(chunks=2), make_checkpoint(size_bytes=20 * MIB)
    granted = await store.client.open(made.wanted())
    feed = Feed(granted)
    feed.taken(10**9)
    feed.taken(-5)
    assert await copied_out(granted, feed) == made.data


async def test_what_is_forgotten_is_freed_and_whoever_has_it_keeps_it(make_store: Make, make_checkpoint: Make) -> None:
    store = await make_store(chunks=2)
    used, unused, large = make_checkpoint("used"), make_checkpoint("unused"), make_checkpoint("large", 12 * MIB)
    lease = await store.load(used)
    os.close((await store.load(unused)).lease_fd)
    store.client.forget(used.digest)
    store.client.forget(unused.digest)
    await store.recorder.until(lambda: not store.entries)
    granted = await store.client.open(large.wanted())
    assert granted.grant.is_ring  # for all but one block of the pool is leased
    assert await copied_out(granted, Feed(granted)) == large.data
    assert content_of(lease) == used.data


async def test_what_is_forgotten_while_it_is_read_goes_when_it_is_there(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.hold(made)
    granted = await store.client.open(made.wanted())
    store.client.forget(made.digest)
    await store.settled()
    store.disk.free(made)
    assert (await Feed(granted).all())[-1] == {"ready": 4}
    await store.recorder.until(lambda: not store.entries)
    assert content_of(granted) == made.data


async def test_memory_of_a_failed_load_is_not_given_out_while_it_is_leased(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, bad, good = await make_store(chunks=2), make_checkpoint("bad"), make_checkpoint("good", 12 * MIB)
    store.disk.fail(bad, flips={3 * MIB: 99})
    lease = await store.client.open(bad.wanted())
    await Feed(lease).all()
    before = content_of(lease)
    granted = await store.client.open(good.wanted())
    assert granted.grant.is_ring
    assert await copied_out(granted, Feed(granted)) == good.data
    assert content_of(lease) == before


async def test_files_are_verified_while_nothing_is_loaded(make_store: Make, make_checkpoint: Make) -> None:
    store, made, busy = await make_store(), make_checkpoint(), make_checkpoint("busy")
    store.disk.hold(busy)
    running = await store.client.open(busy.wanted())
    await store.disk.until_read(busy)
    seen: list[tuple[int, int]] = []
    verifying = store.verify(made, lambda *done: seen.append(done), deep=True)
    assert (await asyncio.wait([verifying], timeout=0.2))[1] == {verifying}
    assert seen == []
    store.disk.free(busy)
    await Feed(running).all()
    await verifying
    assert seen[-1] == (len(made.data), len(made.data))


async def test_verifying_finds_what_is_damaged(make_store: Make, make_checkpoint: Make) -> None:
    store, made, other = await make_store(), make_checkpoint(), make_checkpoint("other")
    _damage(made)
    with pytest.raises(ChunkCorrupt):
        await store.verify(made)
    await store.recorder.until(lambda: store.recorder.damages)
    damage = store.recorder.damages[0]
    assert (damage.digest, damage.folder, "chunk 1" in damage.message) == (made.digest, str(made.folder), True)
    os.truncate(other.file, 5)
    with pytest.raises(PartitionTruncated):
        await store.verify(other)
    with pytest.raises(ManifestMissing):
        await store.verify(made, folder="/nowhere")
    with pytest.raises(ManifestCorrupt):
        await store.verify(made, folder=str(other.folder))  # another content has taken its place
    await store.recorder.until(lambda: len(store.recorder.damages) == 4)
    assert store.recorder.damages[3].digest == made.digest


async def test_a_verification_that_rests_can_be_called_off_and_the_next_has_its_turn(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, damaged, intact, busy = (
        await make_store(),
        *(make_checkpoint(name) for name in ("damaged", "intact", "busy")),
    )
    _damage(damaged)
    store.disk.hold(busy)
    running = await store.client.open(busy.wanted())
    await store.disk.until_read(busy)
    called_off = store.verify(damaged)
    await store.settled()
    called_off.cancel()
    with pytest.raises(asyncio.CancelledError):
        await called_off
    await store.settled()
    store.disk.free(busy)
    await Feed(running).all()
    await store.verify(intact)
    assert store.recorder.damages == []


async def test_a_defect_in_verifying_is_an_answer_too(make_store: Make, make_checkpoint: Make) -> None:
    store, made = await make_store(), make_checkpoint()
    with pytest.raises(SllmError, match="the store process failed: ValueError"):
        await store.verify(made, folder="\0")  # which no path can be
    await store.verify(made)


async def test_verifications_that_rest_hold_up_no_load_however_many(make_store: Make, make_checkpoint: Make) -> None:
    store = await make_store()
    busy, following, made = (make_checkpoint(name) for name in ("busy", "following", "made"))
    store.disk.hold(busy)
    running = await store.client.open(busy.wanted())
    await store.disk.until_read(busy)
    waiting = store.begin(following)
    verifying = [store.verify(made) for _ in range(40)]
    await store.settled()
    store.disk.free(busy)
    for granted in (running, await waiting):
        assert (await Feed(granted).all())[-1] == {"ready": 4}
    await asyncio.gather(*verifying)


def _damage(made: Made) -> None:
    with made.file.open("r+b") as file:
        file.seek(MIB)
        file.write(b"other")


class Gate:
    """Inherited memory is intact, but only once the gate is open."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self, *entry: object) -> bool:
        return self.open.wait(30)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


async def test_what_was_inherited_gives_way_to_a_load_unless_somebody_waits_for_it(
    make_store: Make, make_checkpoint: Make, gate: Gate
) -> None:
    before = await make_store(chunks=2)
    first, second, third = (make_checkpoint(name) for name in ("first", "second", "third"))
    for made in (first, second):
        os.close((await before.load(made)).lease_fd)
    await before.recorder.until(lambda: all(entry.state is EntryState.READY for entry in before.entries))
    store = await make_store(before=before.store, is_intact=gate)
    waiting = store.begin(second)
    await store.settled()
    assert content_of(await store.load(third)) == third.data
    assert {entry.digest for entry in store.entries} == {second.digest, third.digest}
    with pytest.raises(Unavailable, match="in use"):
        await store.client.open(first.wanted())
    gate.open.set()
    assert content_of(await waiting) == second.data
    assert store.disk.opens == ["third"]


async def test_a_deadline_ends_the_wait_for_what_is_being_verified(
    make_store: Make, make_checkpoint: Make, gate: Gate
) -> None:
    before, made = await make_store(), make_checkpoint()
    os.close((await before.load(made)).lease_fd)
    await before.recorder.until(lambda: before.entries[0].state is EntryState.READY)
    store = await make_store(before=before.store, is_intact=gate)
    with pytest.raises(DeadlineExceeded):
        await store.client.open(made.wanted(deadline_s=0.1))
    gate.open.set()
    assert content_of(await store.load(made)) == made.data


async def test_a_deadline_ends_the_wait_for_a_load_that_is_being_called_off(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.hold(made)
    granted = await store.client.open(made.wanted())
    await store.disk.until_read(made)
    granted.close()
    await store.settled()
    with pytest.raises(DeadlineExceeded):
        await store.client.open(made.wanted(deadline_s=0.1))
    store.disk.free(made)
    await store.recorder.until(lambda: not store.entries)
    await store.load(make_checkpoint("last"))
    assert store.disk.opens == ["demo", "last"]


async def test_who_leaves_while_a_load_is_being_called_off_begins_no_other(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made = await make_store(), make_checkpoint()
    store.disk.hold(made)
    granted = await store.client.open(made.wanted())
    await store.disk.until_read(made)
    granted.close()
    await store.settled()
    late = store.begin(made)
    await store.settled()
    late.cancel()
    await asyncio.wait([late])
    await store.settled()
    store.disk.free(made)
    await store.recorder.until(lambda: not store.entries)
    await store.load(make_checkpoint("last"))
    assert store.disk.opens == ["demo", "last"]


async def test_an_agent_is_told_of_more_entries_than_it_could_be_sent_messages(make_checkpoint: Make) -> None:
    count = 5000
    pool = SharedPool.create(count * POOL_BLOCK_BYTES, hugepages=False)
    table = Table(pool.size_bytes, 1)
    for number in range(count):
        table.add(
            digest=f"sha256:{number}",
            partition=0,
            checkpoint=f"sha256:{number}",
            folder="/nowhere",
            size_bytes=MIB,
            chunk_bytes=MIB,
            slots=1,
            now=0.0,
        )
    server = Server(pool, table, threads=1, grace_s=60.0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.accept(theirs)
    client = StoreClient(ours, Recorder())
    try:
        async with asyncio.timeout(30):
            await client.welcome()
        assert tuple(client.entries.values()) == table.entries
    finally:
        client.close()
        server.close()
        os.close(pool.fd)


async def test_what_is_leased_though_its_entry_is_gone_is_told_until_a_ping_finds_it_free(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made = await make_store(), make_checkpoint()
    granted = await store.load(made)
    store.client.forget(made.digest)
    await store.recorder.until(lambda: store.store.kept_back_bytes)
    assert (store.entries, store.store.kept_back_bytes) == ([], POOL_BLOCK_BYTES)
    await store.client.ping()
    assert store.store.kept_back_bytes == POOL_BLOCK_BYTES
    os.close(granted.lease_fd)
    await store.client.ping()
    assert store.store.kept_back_bytes == 0
