"""Packets, and what a connection does with ones that are large, wrong, or not read."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import pytest
from agent.store.conftest import Recorder
from hypothesis import given
from hypothesis import strategies as st

from sllm.agent.store import protocol
from sllm.agent.store.channel import Channel
from sllm.agent.store.client import Died, StoreClient, Wanted
from sllm.agent.store.feed import Feed
from sllm.agent.store.protocol import Malformed, Message, decode, encode
from sllm.core.grant import POOL_BLOCK_BYTES, Extent
from sllm.core.priority import Priority
from sllm.errors import DeadlineExceeded
from sllm.loader.memory.table import Entry, EntryState

ENTRY = Entry(
    generation=7,
    digest="sha256:a",
    partition=1,
    checkpoint="sha256:b",
    folder="/c",
    size_bytes=10 << 20,
    chunk_bytes=1 << 20,
    slots=10,
    extents=(Extent(0, POOL_BLOCK_BYTES), Extent(3 * POOL_BLOCK_BYTES, POOL_BLOCK_BYTES)),
    state=EntryState.READY,
    reload_s=1.5,
    uses=3,
    last_used=2.5,
)
COUNTS, TEXTS = st.integers(0, 1 << 62), st.text()
MESSAGES = st.one_of(
    st.builds(protocol.Hello),
    st.builds(
        protocol.Open,
        id=COUNTS,
        digest=TEXTS,
        checkpoint=TEXTS,
        folder=TEXTS,
        partition=COUNTS,
        priority=st.sampled_from(Priority),
        deadline_s=st.floats(0, 1e9),
    ),
    st.builds(protocol.Abandon, id=COUNTS),
    st.builds(protocol.Verify, id=COUNTS, digest=TEXTS, folder=TEXTS, deep=st.booleans()),
    st.builds(protocol.Quit, keep=st.booleans()),
    st.builds(protocol.Ping),
    st.builds(protocol.Pong),
    st.builds(protocol.Kept, kept_back_bytes=COUNTS),
    st.builds(protocol.Holdings, entries=st.lists(st.dictionaries(TEXTS, COUNTS)), kept_back_bytes=COUNTS),
    st.builds(protocol.Welcome, release=TEXTS, size_bytes=COUNTS, huge=st.booleans(), pid=COUNTS),
    st.builds(protocol.Refused, id=COUNTS, reason=TEXTS, message=TEXTS, hint=TEXTS),
    st.builds(protocol.Loaded, checkpoint=TEXTS, size_bytes=COUNTS, queue_s=st.floats(0, 10), read_s=st.floats(0, 10)),
)


@given(MESSAGES)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert decode(encode(message)) == message


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXTS, lambda inner: st.lists(inner))


@given(st.binary() | st.builds(lambda value: json.dumps(value).encode(), JSON))
def test_what_is_no_message_is_malformed_and_nothing_else(packet: bytes) -> None:
    with pytest.raises(Malformed):
        decode(packet)


@given(MESSAGES, st.data())
def test_a_field_of_another_type_is_malformed(message: Message, data: st.DataObject) -> None:
    values = json.loads(encode(message))
    name = data.draw(st.sampled_from(sorted(values)))
    values[name] = [values[name]]
    with pytest.raises(Malformed):
        decode(json.dumps(values).encode())


def test_entries_grants_and_tables_arrive_as_they_were_sent() -> None:
    holds = decode(encode(protocol.Holds(entry=ENTRY.as_json())))
    assert isinstance(holds, protocol.Holds)
    assert protocol.entry_from(holds.entry) == ENTRY
    granted = decode(encode(protocol.Granted(id=1, grant=protocol.grant_of(ENTRY, 4))))
    assert isinstance(granted, protocol.Granted)
    grant = protocol.grant_from(granted.grant)
    assert (grant.extents, grant.chunks, grant.ready_chunks, grant.generation) == (ENTRY.extents, 10, 4, 7)
    assert protocol.table_from(protocol.table_bytes([ENTRY, ENTRY])) == (ENTRY, ENTRY)


@pytest.mark.parametrize(
    "changes",
    [
        {"extents": 5},
        {"extents": [[1]]},
        {"extents": [["a", 1]]},
        {"state": "x"},
        {"chunk_bytes": 0},
        {"size_bytes": -1},
        {"uses": True},
        {"more": 1},
    ],
)
def test_an_entry_that_cannot_be_true_is_malformed(changes: dict[str, Any]) -> None:
    values = json.loads(json.dumps(ENTRY.as_json())) | changes
    with pytest.raises(Malformed):
        protocol.entry_from(values)
    with pytest.raises(Malformed):
        protocol.table_from(json.dumps([values]).encode())


class End:
    """One end of a connection, and what it heard."""

    def __init__(self, sock: socket.socket) -> None:
        self.messages: asyncio.Queue[tuple[Message, list[int]]] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.channel = Channel(sock, lambda message, fds: self.messages.put_nowait((message, fds)), self.ended.set)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


async def test_a_message_of_any_size_arrives_with_its_descriptors() -> None:
    one, other = map(End, pair())
    for text in ("x", "x" * (1 << 20)):
        read_fd, write_fd = os.pipe()
        one.channel.send(protocol.Refused(id=1, reason=text, message="", hint=""), (read_fd, write_fd))
        message, fds = await other.messages.get()
        assert isinstance(message, protocol.Refused)
        assert message.reason == text
        os.write(fds[1], b"through")
        assert os.read(fds[0], 7) == b"through"
        for fd in fds:
            os.close(fd)
        with pytest.raises(OSError):
            os.fstat(write_fd)  # what was sent is no longer open here
    for end in (one, other):
        end.channel.close()


async def test_many_messages_to_one_that_reads_slowly_arrive_in_order() -> None:
    ours, theirs = pair()
    one = End(ours)
    for number in range(3000):
        one.channel.send(protocol.Abandon(id=number))
    other = End(theirs)
    heard = [(await other.messages.get())[0] for _ in range(3000)]
    assert heard == [protocol.Abandon(id=number) for number in range(3000)]
    for end in (one, other):
        end.channel.close()


async def test_one_that_reads_nothing_is_given_up_and_its_descriptors_are_closed() -> None:
    ours, theirs = pair()
    one = End(ours)
    fds = []
    for number in range(6000):
        fds.append(os.open("/dev/null", os.O_RDONLY) if number == 5000 else -1)
        one.channel.send(protocol.Abandon(id=number), tuple(fd for fd in fds[-1:] if fd >= 0))
    async with asyncio.timeout(10):
        await one.ended.wait()
    with pytest.raises(OSError):
        os.fstat(fds[5000])
    one.channel.send(protocol.Abandon(id=1), (theirs_copy := os.dup(theirs.fileno()),))
    with pytest.raises(OSError):
        os.fstat(theirs_copy)
    theirs.close()


async def test_the_end_of_the_other_end_is_told_once() -> None:
    ours, theirs = pair()
    one = End(ours)
    theirs.close()
    one.channel.send(protocol.Ping())
    async with asyncio.timeout(10):
        await one.ended.wait()
    assert one.channel.closed
    one.channel.close()


@pytest.mark.parametrize("packet", [b"{}", b'{"kind": "nothing"}', b"x" * 100_000])
async def test_nonsense_ends_the_connection_and_leaves_no_descriptor_open(packet: bytes) -> None:
    ours, theirs = pair()
    one = End(ours)
    read_fd, write_fd = os.pipe()
    socket.send_fds(theirs, [packet], [write_fd])
    os.close(write_fd)
    async with asyncio.timeout(10):
        await one.ended.wait()
    assert os.read(read_fd, 1) == b""  # nobody has the other end any more
    os.close(read_fd)
    theirs.close()


@pytest.mark.parametrize(("values", "count"), [(None, 0), (None, 1), (None, 3), ({}, 2), ({"extents": 5}, 2)])
async def test_a_grant_that_cannot_be_used_ends_the_connection(values: dict[str, Any] | None, count: int) -> None:
    ours, theirs = pair()
    client = StoreClient(ours, Recorder())
    asking = asyncio.create_task(client.open(Wanted(digest="a", checkpoint="a", folder="/a")))
    await asyncio.sleep(0)  # until it is asked
    grant = protocol.grant_of(ENTRY, 4) if values is None else values
    socket.send_fds(theirs, [encode(protocol.Granted(id=1, grant=grant))], [theirs.fileno()] * count)
    with pytest.raises(Died):
        async with asyncio.timeout(10):
            await asking
    theirs.close()


def said(sock: socket.socket) -> list[dict[str, Any]]:
    """Return what a feed has said so far, None for its end."""
    sock.setblocking(False)
    messages = []
    try:
        while True:
            packet = sock.recv(64 << 10)
            messages.append(json.loads(packet) if packet else None)
            if not packet:
                return messages
    except BlockingIOError:
        return messages


async def test_a_feed_that_is_not_read_skips_words_but_not_the_last() -> None:
    ours, theirs = pair()
    feed = Feed(ours, lambda taken: None, lambda: None)
    for number in range(1, 5001):
        feed.ready(number)
    feed.finish(5001)
    heard = said(theirs)
    while heard[-1] is not None:
        await asyncio.sleep(0)  # the feed's own turn
        heard += said(theirs)
    ready = [message["ready"] for message in heard[:-1]]
    assert ready == sorted(set(ready))
    assert (len(ready) < 5001, ready[-1]) == (True, 5001)
    theirs.close()


async def test_the_last_word_is_heard_though_the_other_end_has_spoken_meanwhile() -> None:
    ours, theirs = pair()
    feed = Feed(ours, lambda taken: None, lambda: None)
    theirs.send(b'{"taken": 1}')
    feed.finish(3)
    assert said(theirs) == [{"ready": 3}, None]
    theirs.close()


async def test_a_feed_says_what_failed_even_at_length() -> None:
    ours, theirs = pair()
    feed = Feed(ours, lambda taken: None, lambda: None)
    feed.fail(DeadlineExceeded("ä" * 10_000, hint="h" * 10_000))
    feed.ready(4)  # too late
    (message, end) = said(theirs)
    assert (message["error"], end) == ("DEADLINE_EXCEEDED", None)
    theirs.close()


@pytest.mark.parametrize("packet", [b"", b"x", b"[]", b'{"taken": "1"}', b'{"taken": 1.5}'])
async def test_a_user_of_a_feed_who_speaks_nonsense_is_gone(packet: bytes) -> None:
    ours, theirs = pair()
    gone = asyncio.Event()
    Feed(ours, lambda taken: None, gone.set)
    if packet:
        theirs.send(packet)
    else:
        theirs.close()
    async with asyncio.timeout(10):
        await gone.wait()
    theirs.close()


async def test_a_feed_that_expires_fails_once_and_one_that_has_ended_does_not() -> None:
    expired = asyncio.Event()
    ours, theirs = pair()
    Feed(ours, lambda taken: None, lambda: None).expire_after(0.01, DeadlineExceeded("late"), expired.set)
    async with asyncio.timeout(10):
        await expired.wait()
    assert said(theirs) == [{"error": "DEADLINE_EXCEEDED", "message": "late", "hint": ""}, None]
    theirs.close()
    ours, theirs = pair()
    feed = Feed(ours, lambda taken: None, lambda: None)
    feed.expire_after(0.0, DeadlineExceeded("late"), lambda: pytest.fail("it had ended"))
    feed.finish(1)
    await asyncio.sleep(0)  # a timer of no seconds has its turn
    assert said(theirs) == [{"ready": 1}, None]
    theirs.close()
