"""Whose turn it is to read: what is more urgent interrupts, and what was interrupted goes on where it stopped."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from agent.store.conftest import MIB, Disk, Feed, Made, Recorder, StoreInTest, content_of, copied_out
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm.agent.store.fake import FakeStore
from sllm.core.grant import POOL_BLOCK_BYTES
from sllm.core.priority import Priority
from sllm.errors import DeadlineExceeded
from sllm.loader.memory.table import EntryState

Make = Callable[..., Any]
PREFETCH, PREWARM, REQUEST = Priority.PREFETCH, Priority.PREWARM, Priority.REQUEST
CHUNKS = 4


async def interrupted(store: Any, less: Any, more: Any, *, priority: Priority = PREFETCH) -> tuple[Feed, Any]:
    """Begin to read `less`, and have `more` interrupt it at its first chunk; both are held there. Return the feed of
    `less` and the task that opens `more`."""
    for made in (less, more):
        store.disk.hold(made)
    feed = await reading(store, less, priority)
    begun = store.begin(more)
    await store.disk.until_read(more)
    return feed, begun


async def reading(store: Any, made: Any, priority: Priority) -> Feed:
    """Open one that nobody leases, as a prefetch does, and return its feed when it is read."""
    granted = await store.client.open(made.wanted(priority=priority))
    os.close(granted.lease_fd)
    await store.disk.until_read(made)
    return Feed(granted)


async def finished(feed: Feed) -> None:
    assert (await feed.all())[-1] == {"ready": CHUNKS}


async def test_a_request_interrupts_what_is_read_for_less_and_that_goes_on_where_it_stopped(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, less, more = await make_store(), make_checkpoint("less"), make_checkpoint("more")
    feed, asked = await interrupted(store, less, more)
    store.disk.free(less)
    assert await feed.next() == {"ready": 1}  # what was under way ends
    store.disk.free(more)
    await finished(Feed(await asked))
    assert content_of(await asked) == more.data
    await finished(feed)
    assert store.disk.begun == ["less", *["more"] * CHUNKS, *["less"] * (CHUNKS - 1)]
    assert content_of(await store.client.open(less.wanted())) == less.data


@pytest.mark.parametrize("priority", Priority)
async def test_an_equal_interrupts_nobody(make_store: Make, make_checkpoint: Make, priority: Priority) -> None:
    store, first, second = await make_store(), make_checkpoint("first"), make_checkpoint("second")
    store.disk.hold(first)
    feed = await reading(store, first, priority)
    waiting = store.begin(second, priority=priority)
    await store.settled()
    store.disk.free(first)
    await finished(feed)
    await finished(Feed(await waiting))
    assert store.disk.begun == ["first"] * CHUNKS + ["second"] * CHUNKS


@pytest.mark.parametrize("by", ["joining", "raising"])
async def test_one_that_was_interrupted_goes_on_at_once_when_a_request_comes_to_wait_for_it(
    make_store: Make, make_checkpoint: Make, by: str
) -> None:
    store, less, more = await make_store(), make_checkpoint("less"), make_checkpoint("more")
    for made in (less, more):
        store.disk.hold(made)
    feed = await reading(store, less, PREFETCH)
    warmed = await reading(store, more, PREWARM)
    if by == "joining":
        (await store.client.open(less.wanted())).close()
    else:
        store.client.raise_to(less.digest, REQUEST)
        await store.settled()
    store.disk.free(less)
    await finished(feed)
    store.disk.free(more)
    await finished(warmed)
    assert store.disk.begun == ["less", "more", *["less"] * (CHUNKS - 1), *["more"] * (CHUNKS - 1)]


async def test_one_that_waits_in_the_queue_interrupts_when_it_is_raised(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, first, second = await make_store(), make_checkpoint("first"), make_checkpoint("second")
    store.disk.hold(first)
    feed = await reading(store, first, PREWARM)
    waiting = store.begin(second, priority=PREWARM)
    await store.settled()
    store.client.raise_to(second.digest, REQUEST)
    store.client.raise_to(second.digest, PREFETCH)  # nobody is lowered
    await finished(Feed(await waiting))
    store.disk.free(first)
    await finished(feed)


async def test_who_waits_for_one_that_is_being_called_off_begins_the_next_at_the_priority_it_got_meanwhile(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, made, busy = await make_store(), make_checkpoint("made"), make_checkpoint("busy")
    for each in (made, busy):
        store.disk.hold(each)
    (await reading(store, made, PREFETCH)).sock.close()
    await store.settled()
    late = store.begin(made, priority=PREFETCH)
    waiting = store.begin(busy, priority=PREWARM)
    await store.disk.until_read(busy)
    store.client.raise_to(made.digest, REQUEST)
    await store.settled()
    store.disk.free(made)
    await finished(Feed(await late))
    assert store.disk.begun.count("busy") == 1
    store.disk.free(busy)
    await finished(Feed(await waiting))


async def test_the_time_that_a_load_was_interrupted_is_waiting_not_reading(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, less, more = await make_store(), make_checkpoint("less"), make_checkpoint("more")
    began = time.monotonic()
    feed, asked = await interrupted(store, less, more)
    store.disk.free(less)
    await asyncio.wait([asyncio.create_task(store.recorder.until(lambda: store.recorder.loads))], timeout=0.2)
    store.disk.free(more)
    await finished(Feed(await asked))
    await finished(feed)
    await store.recorder.until(lambda: len(store.recorder.loads) == 2)
    total_s = time.monotonic() - began
    loaded = {load.checkpoint: load for load in store.recorder.loads}
    assert loaded[less.digest].queue_s >= 0.2
    assert 0 < loaded[less.digest].read_s <= total_s - 0.2
    assert loaded[more.digest].read_s >= 0.2


async def test_one_that_was_interrupted_can_be_called_off_and_gives_its_memory_back(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, less, more = await make_store(), make_checkpoint("less"), make_checkpoint("more")
    feed, asked = await interrupted(store, less, more)
    feed.sock.close()
    store.disk.free(less)
    await store.recorder.until(lambda: [entry.digest for entry in store.entries] == [more.digest])
    store.disk.free(more)
    await finished(Feed(await asked))
    assert store.disk.begun.count("less") == 1
    await store.load(make_checkpoint("last"))


async def test_a_deadline_ends_one_that_was_interrupted(make_store: Make, make_checkpoint: Make) -> None:
    store, less, more = await make_store(), make_checkpoint("less"), make_checkpoint("more")
    for made in (less, more):
        store.disk.hold(made)
    granted = await store.client.open(less.wanted(priority=PREWARM, deadline_s=0.3))
    asked = store.begin(more)
    await store.disk.until_read(more)
    assert (await Feed(granted).all())[-1]["error"] == DeadlineExceeded.reason
    store.disk.free(more)
    await finished(Feed(await asked))
    store.disk.free(less)
    await store.recorder.until(lambda: [entry.state for entry in store.entries] == [EntryState.READY])


async def test_the_end_of_the_better_one_by_an_error_lets_the_other_go_on(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, less, more = await make_store(), make_checkpoint("less"), make_checkpoint("more")
    store.disk.fail(more, flips={0: 99})
    feed, asked = await interrupted(store, less, more)
    store.disk.free(more)
    assert (await Feed(await asked).all())[-1]["error"] == "CHUNK_CORRUPT"
    store.disk.free(less)
    await finished(feed)


async def test_files_are_not_verified_while_one_that_was_interrupted_is_read_to_its_end(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, less, more, files = await make_store(), *map(make_checkpoint, ("less", "more", "files"))
    feed, asked = await interrupted(store, less, more)
    verifying = store.verify(files)
    store.disk.free(more)
    await finished(Feed(await asked))
    assert (await asyncio.wait([verifying], timeout=0.2))[1] == {verifying}
    store.disk.free(less)
    await finished(feed)
    await verifying


async def test_a_request_that_needs_the_memory_of_what_it_interrupted_lets_that_end_first(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, less, more, third = await make_store(chunks=1), *map(make_checkpoint, ("less", "more", "third"))
    store.disk.hold(less)
    feed = await reading(store, less, PREFETCH)
    asked = store.begin(more)
    warmed = store.begin(third, priority=PREWARM)  # which the prefetch goes before, for the request's sake
    await store.settled()
    store.disk.free(less)
    await finished(feed)
    granted = await asked
    assert not granted.grant.is_ring
    await finished(Feed(granted))
    assert content_of(granted) == more.data
    os.close(granted.lease_fd)
    await finished(Feed(await warmed))
    assert store.disk.begun == [name for name in ("less", "more", "third") for _ in range(CHUNKS)]


async def test_a_request_that_waits_for_memory_can_leave(make_store: Make, make_checkpoint: Make) -> None:
    store, less, more = await make_store(chunks=1), make_checkpoint("less"), make_checkpoint("more")
    tasks = asyncio.all_tasks()
    store.disk.hold(less)
    feed = await reading(store, less, PREFETCH)
    asked = store.begin(more)
    await store.settled()
    asked.cancel()
    await asyncio.wait([asked])
    store.disk.free(less)
    await finished(feed)
    await store.load(make_checkpoint("last"))
    assert "more" not in store.disk.opens
    await store.settled()
    assert asyncio.all_tasks() == tasks, "somebody waits for a turn that never comes"


async def test_a_ring_is_interrupted_and_loses_nothing(make_store: Make, make_checkpoint: Make) -> None:
    store, large, more = await make_store(chunks=2, threads=3), make_checkpoint("large", 20 * MIB), make_checkpoint()
    granted = await store.client.open(large.wanted(priority=PREWARM))
    assert granted.grant.is_ring
    assert content_of(await store.load(more)) == more.data
    feed = Feed(granted)
    assert await copied_out(granted, feed) == large.data


async def test_a_ring_that_nobody_reads_holds_up_nobody_after_it_was_interrupted(
    make_store: Make, make_checkpoint: Make
) -> None:
    store, large, more = await make_store(chunks=2), make_checkpoint("large", 20 * MIB), make_checkpoint("more")
    slow = await store.client.open(large.wanted(priority=PREWARM))
    while store.disk.begun.count("large") < slow.grant.slots:
        await store.disk.reading.wait_beyond(store.disk.reading.revision)
    store.disk.hold(more)
    asked = store.begin(more)
    await store.disk.until_read(more)
    unread = asyncio.create_task(store.recorder.until(lambda: store.recorder.loads))
    await asyncio.wait([unread], timeout=4.5)  # while it waits for its turn, its reader's patience does not count
    store.disk.free(more)
    os.close((await asked).lease_fd)
    await unread
    assert content_of(await store.load(make_checkpoint("last"), priority=PREFETCH))
    feed = Feed(slow)
    assert await copied_out(slow, feed) == large.data


STEPS = st.tuples(st.sampled_from(["open", "leave", "raise", "free"]), st.integers(0, 3), st.sampled_from(Priority))


@given(steps=st.lists(STEPS, max_size=12), blocks=st.integers(1, 4), threads=st.integers(1, 3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whoever_comes_and_goes_all_who_stay_are_served(
    make_checkpoint: Make, steps: list[tuple[str, int, Priority]], blocks: int, threads: int
) -> None:
    asyncio.run(play(checkpoints(make_checkpoint), steps, blocks, threads))


def checkpoints(make_checkpoint: Make) -> list[Made]:
    """Return those of the test, which all its examples share."""
    if not hasattr(make_checkpoint, "made"):
        make_checkpoint.made = [make_checkpoint(f"made-{number}") for number in range(4)]
    return make_checkpoint.made


async def play(made: list[Made], steps: list[tuple[str, int, Priority]], blocks: int, threads: int) -> None:
    """Hold all reads, let users come and go, and let what is read go on, all as the steps say."""
    disk, recorder = Disk(), Recorder()
    fake = FakeStore(blocks * POOL_BLOCK_BYTES, threads=threads, open_source=disk.open)
    fake.start(recorder)
    store, users = StoreInTest(fake, await fake.client(), recorder, disk), []
    for each in made:
        disk.hold(each)
    try:
        for step, number, priority in steps:
            if step == "open":
                users.append(asyncio.create_task(use(store, made[number], priority)))
            elif step == "leave" and number < len(users):
                users[number].cancel()
            elif step == "raise":
                store.client.raise_to(made[number].digest, priority)
            elif step == "free":
                disk.free(made[number])
            await store.settled()
        disk.free_all()
        for user in users:
            with suppress(asyncio.CancelledError):
                await user
    finally:
        disk.free_all()
        await fake.close(stop=True)


async def use(store: StoreInTest, made: Made, priority: Priority) -> None:
    """Have a checkpoint loaded, as a prefetch does: its memory may go again at once."""
    granted = await store.client.open(made.wanted(priority=priority))
    os.close(granted.lease_fd)
    feed = Feed(granted)
    try:
        await finished(feed)
    finally:
        feed.sock.close()
