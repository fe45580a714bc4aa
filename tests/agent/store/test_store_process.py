"""The store process for real: its pool outlives it, its agent, and what either was doing when it died."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from agent.store.conftest import MIB, Feed, ProcessInTest, Recorder, content_of, copied_out

from sllm.agent.processes import open_process
from sllm.agent.store import protocol
from sllm.agent.store.client import Died, StoreClient
from sllm.agent.store.process import present_bytes
from sllm.core.grant import POOL_BLOCK_BYTES
from sllm.core.priority import Priority
from sllm.errors import SllmError, Unavailable
from sllm.linux import start_ticks
from sllm.loader.memory.table import EntryState

pytestmark = pytest.mark.e2e
Make = Callable[..., Any]


FAILPOINTS = ("before-grant", "after-grant", "mid-read", "after-read", "in-evict", "in-adopt")


def test_every_failpoint_of_the_store_process_is_tried() -> None:
    folder = Path(protocol.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    assert {part.split('"')[0] for part in text.split('failpoint("')[1:]} == set(FAILPOINTS)


async def ended(pid: int) -> None:
    """Wait until a process is gone."""
    pidfd = open_process(pid)
    if pidfd is None:
        return
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, event.set)
    try:
        async with asyncio.timeout(30):
            await event.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def killed(store: ProcessInTest) -> None:
    """Kill the store process, and return when the next one has verified what it was left."""
    before = store.pid
    os.kill(before, signal.SIGKILL)
    await ended(before)
    await store.recorder.until(lambda: not store.process.is_there)
    await store.client()
    assert store.pid != before
    await store.recorder.until(lambda: all(entry.state is not EntryState.VERIFYING for entry in store.entries))


def test_it_imports_neither_torch_nor_grpc_nor_pydantic() -> None:
    code = (
        "import sllm.agent.store.main, sys;"
        "print([m for m in ('torch', 'grpc', 'google.protobuf', 'pydantic', 'vllm') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


async def test_loads_and_keeps(make_process: Make, make_checkpoint: Make) -> None:
    store, made = make_process(prefault=True, lock=True), make_checkpoint(size_bytes=9 * MIB)
    granted = await store.load(made)
    assert content_of(granted) == made.data
    await store.recorder.until(lambda: store.recorder.loads)
    assert [(entry.state, entry.checkpoint) for entry in store.entries] == [(EntryState.READY, made.digest)]
    os.close(granted.lease_fd)


async def test_a_killed_store_process_is_replaced_and_its_content_verified_and_kept(
    make_process: Make, make_checkpoint: Make
) -> None:
    store, made = make_process(), make_checkpoint()
    before = await store.load(made)
    await killed(store)
    assert [(entry.state, entry.generation) for entry in store.entries] == [(EntryState.READY, before.grant.generation)]
    after = await store.load(made)
    assert (after.grant.extents, after.grant.ready_chunks) == (before.grant.extents, 4)
    assert content_of(after) == content_of(before) == made.data
    assert len(store.recorder.loads) == 1


async def test_memory_that_was_changed_is_noticed_by_the_next_one(make_process: Make, make_checkpoint: Make) -> None:
    store, made = make_process(), make_checkpoint()
    os.close((await store.load(made)).lease_fd)
    pool_fd = (await store.client()).pool_fd
    os.pwrite(pool_fd, b"x", store.entries[0].extents[0].offset + 3 * MIB)
    await killed(store)
    assert store.entries == []
    assert content_of(await store.load(made)) == made.data


async def test_a_lease_outlives_the_store_process_and_its_memory_is_not_given_to_others(
    make_process: Make, make_checkpoint: Make
) -> None:
    store = make_process(chunks=2)
    first, second, third = (make_checkpoint(name) for name in ("first", "second", "third"))
    lease = await store.load(first)
    (first.folder / "manifest.json").unlink()  # the next one cannot verify it, and drops it
    await killed(store)
    assert store.entries == []
    os.close((await store.load(second)).lease_fd)
    os.close((await store.load(third)).lease_fd)
    assert content_of(lease) == first.data
    assert [entry.digest for entry in store.entries] == [third.digest]


@pytest.mark.parametrize("failpoint", FAILPOINTS[:4])
async def test_who_waits_when_it_dies_is_told_or_served_by_the_next_one(
    make_process: Make, make_checkpoint: Make, failpoint: str
) -> None:
    store, made = make_process(failpoint=failpoint), make_checkpoint(size_bytes=12 * MIB)
    client = await store.client()
    store.environment["SLLM_FAILPOINT"] = ""
    try:
        granted = await client.open(made.wanted())
    except Died:
        assert failpoint in ("before-grant", "after-grant")
    else:
        messages = await Feed(granted).all()
        assert all(message.get("ready", 0) < granted.grant.chunks for message in messages) or failpoint == "after-read"
        os.close(granted.lease_fd)
    await store.recorder.until(lambda: not store.process.is_there or store.entries == [])
    assert content_of(await store.load(made)) == made.data
    assert sum(entry.held_bytes for entry in store.entries) == 2 * POOL_BLOCK_BYTES


async def test_dying_as_it_evicts_loses_nothing_that_is_leased(make_process: Make, make_checkpoint: Make) -> None:
    store = make_process(failpoint="in-evict", chunks=2)
    first, second, third = (make_checkpoint(name) for name in ("first", "second", "third"))
    lease = await store.load(first)
    os.close((await store.load(second)).lease_fd)
    store.environment["SLLM_FAILPOINT"] = ""
    with pytest.raises(Died):
        await (await store.client()).open(third.wanted())
    await store.recorder.until(lambda: not store.process.is_there)
    assert content_of(await store.load(third)) == third.data
    assert content_of(lease) == first.data
    assert {entry.digest for entry in store.entries} == {first.digest, third.digest}


async def test_dying_as_it_takes_over_leaves_all_to_the_one_after(make_process: Make, make_checkpoint: Make) -> None:
    store, made = make_process(failpoint="in-adopt"), make_checkpoint()
    lease = await store.load(made)
    first = store.pid
    os.kill(first, signal.SIGKILL)
    await ended(first)
    await store.recorder.until(lambda: store.pid != first)
    second = store.pid
    store.environment["SLLM_FAILPOINT"] = ""
    await ended(second)
    async with asyncio.timeout(30):
        while store.pid == second or not store.process.is_there or store.entries[0].state is not EntryState.READY:
            await store.recorder.changes.wait_beyond(store.recorder.changes.revision)
    assert [entry.generation for entry in store.entries] == [lease.grant.generation]
    assert content_of(lease) == made.data


async def test_the_next_agent_finds_the_process_and_its_pool(make_process: Make, make_checkpoint: Make) -> None:
    store, made = make_process(), make_checkpoint()
    lease = await store.load(made)
    pid = store.pid
    await store.process.close(stop=False)
    assert await present_bytes(store.log_path.parent) >= len(made.data)
    again = make_process()
    await again.client()
    assert again.pid == pid
    assert [entry.state for entry in again.entries] == [EntryState.READY]
    granted = await again.load(made)
    assert granted.grant.generation == lease.grant.generation
    assert again.recorder.loads == []


async def test_a_load_goes_on_without_its_agent_for_whoever_has_its_feed(
    make_process: Make, make_checkpoint: Make
) -> None:
    store, made = make_process(chunks=2), make_checkpoint(size_bytes=20 * MIB)
    granted = await (await store.client()).open(made.wanted())
    await store.process.close(stop=False)
    assert await copied_out(granted, Feed(granted)) == made.data
    await make_process(chunks=2).client()  # which ends it


async def test_when_agent_and_store_process_both_die_what_is_leased_stays_with_its_holder(
    make_process: Make, make_checkpoint: Make
) -> None:
    store, made = make_process(), make_checkpoint()
    lease = await store.load(made)
    pid = store.pid
    await store.process.close(stop=False)
    os.kill(pid, signal.SIGKILL)
    await ended(pid)
    again = make_process()
    await again.client()
    assert again.entries == []
    assert content_of(lease) == made.data
    assert content_of(await again.load(made)) == made.data


async def test_another_size_takes_a_new_pool_and_any_size_keeps_the_old_one(
    make_process: Make, make_checkpoint: Make
) -> None:
    store, made = make_process(chunks=2), make_checkpoint()
    lease = await store.load(made)
    pid = store.pid
    await store.process.close(stop=False)
    same = make_process(chunks=3, any_size=True)
    await same.client()
    assert (same.pid, same.process.size_bytes) == (pid, 2 * POOL_BLOCK_BYTES)
    await same.process.close(stop=False)
    other = make_process(chunks=3)
    await other.client()
    assert (other.process.size_bytes, other.entries) == (3 * POOL_BLOCK_BYTES, [])
    assert start_ticks(pid) is None
    assert content_of(lease) == made.data


async def test_without_an_agent_it_ends_after_the_grace(make_process: Make) -> None:
    store = make_process(grace_s=0.2)
    await store.client()
    pid = store.pid
    await store.process.close(stop=False)
    await ended(pid)
    assert "no agent for 0.2 s" in store.log_path.read_text()
    assert await present_bytes(store.log_path.parent) == 0


async def test_stopping_leaves_no_process_and_no_socket(make_process: Make) -> None:
    store = make_process()
    await store.client()
    pid = store.pid
    await store.process.close(stop=True)
    assert start_ticks(pid) is None
    assert not (store.log_path.parent / "store.sock").exists()


async def test_a_process_that_cannot_start_fails_who_waits_with_its_last_words(make_process: Make) -> None:
    store = make_process(threads="none")
    with pytest.raises(Unavailable, match="invalid int value"):
        await store.client()


async def test_a_defect_in_looking_after_it_is_told_and_overcome(make_process: Make, make_checkpoint: Make) -> None:
    environment: dict[str, Any] = {"VARIABLE": 5}
    store = make_process(environment=environment)
    with pytest.raises(Unavailable, match="cannot be looked after: TypeError"):
        await store.client()
    environment["VARIABLE"] = "text"
    made = make_checkpoint()
    assert content_of(await store.load(made)) == made.data


async def test_one_that_hangs_is_replaced_when_the_next_agent_comes(make_process: Make) -> None:
    store = make_process()
    await store.client()
    pid = store.pid
    os.kill(pid, signal.SIGSTOP)
    await store.process.close(stop=False)
    again = make_process(welcome_s=2.0)
    with pytest.raises(Unavailable, match="does not answer"):
        await again.client()
    await ended(pid)
    while not again.process.is_there:
        with suppress(Unavailable):  # 2 s may be too little for a start, too
            await again.client()
    assert again.pid != pid


async def test_one_that_hangs_is_replaced_and_the_next_one_has_its_pool(
    make_process: Make, make_checkpoint: Make
) -> None:
    store, made = make_process(ping_s=0.1, silent_s=2.0), make_checkpoint()
    before = await store.load(made)
    pid = store.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(Died):
        async with asyncio.timeout(30):
            await (await store.client()).open(made.wanted())
    after = await store.load(made)
    assert start_ticks(pid) is None
    assert after.grant.generation == before.grant.generation
    assert content_of(after) == content_of(before) == made.data
    assert len(store.recorder.loads) == 1


async def test_one_that_is_replaced_leaves_its_pool_to_the_next(make_process: Make, make_checkpoint: Make) -> None:
    store, made = make_process(), make_checkpoint()
    os.close((await store.load(made)).lease_fd)
    pid, client = store.pid, await store.client()
    client.quit(keep=True)
    await client.closed()
    await ended(pid)
    os.close((await store.load(made)).lease_fd)
    assert store.pid != pid
    assert len(store.recorder.loads) == 1


@pytest.mark.parametrize("how", ["stopped", "alone"])
async def test_a_pool_that_is_given_up_keeps_only_what_is_leased(
    make_process: Make, make_checkpoint: Make, how: str
) -> None:
    store = make_process(grace_s=0.2, prefault=True)
    leased, other = make_checkpoint("leased"), make_checkpoint("other")
    lease = await store.load(leased)
    os.close((await store.load(other)).lease_fd)
    pid = store.pid
    await store.process.close(stop=how == "stopped")
    await ended(pid)
    assert os.fstat(lease.lease_fd).st_blocks * 512 == POOL_BLOCK_BYTES
    assert content_of(lease) == leased.data


async def test_it_stays_when_somebody_speaks_nonsense(
    make_process: Make, make_checkpoint: Make, tmp_path: Path
) -> None:
    store, made = make_process(), make_checkpoint()
    await store.client()
    pid, address = store.pid, str(store.log_path.parent / "store.sock")
    nonsense = [
        b"\x00\xff",
        b"[]",
        b'"hello"',
        b"{}",
        b'{"kind": "open"}',
        b'{"kind": "open", "id": "x", "digest": 1}',
        b'{"kind": "hello", "more": 1}',
        b'{"kind": ["hello"]}',
        b'{"kind": "welcome", "release": "x", "size_bytes": 1, "huge": false, "pid": 1}',
        b'{"kind": "abandon", "id": 1e400}',
        b'{"kind": "abandon", "id": ' + b"9" * 5000 + b"}",
        b"[" * 30000,
        b"x" * (100 << 10),
    ]
    for packet in nonsense:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(address)
            sock.settimeout(20)
            read_fd, write_fd = os.pipe()
            socket.send_fds(sock, [packet], [read_fd, write_fd])
            os.close(read_fd)
            os.close(write_fd)
            assert await asyncio.to_thread(sock.recv, 100) == b"", packet[:50]
    assert content_of(await store.load(made)) == made.data
    assert store.pid == pid
    assert start_ticks(pid) is not None


async def test_an_unknown_folder_or_priority_is_an_answer_not_an_end(make_process: Make, make_checkpoint: Make) -> None:
    store, made = make_process(), make_checkpoint()
    client = await store.client()
    for changes in ({"folder": "\0"}, {"folder": "/dev/null"}, {"folder": ""}, {"partition": 10**15}):
        with pytest.raises(SllmError) as caught:
            await client.open(made.wanted(**changes))
        assert not isinstance(caught.value, Died), changes
    granted = await client.open(made.wanted(priority=10**6, deadline_s=-1.0))
    assert (await Feed(granted).all())[-1] == {"ready": 4}


async def test_a_request_is_granted_and_read_while_a_large_prefetch_waits_and_then_goes_on(
    make_process: Make, make_checkpoint: Make
) -> None:
    store = make_process(chunks=40)
    large, asked = make_checkpoint("large", 256 * MIB), make_checkpoint("asked")
    client = await store.client()
    fetched = await client.open(large.wanted(priority=Priority.PREFETCH))
    feed = Feed(fetched)
    assert await feed.next() is not None  # it is being read
    granted = await store.load(asked)
    assert content_of(granted) == asked.data
    assert (await feed.all())[-1] == {"ready": 256}
    assert content_of(fetched) == large.data
    await store.recorder.until(lambda: len(store.recorder.loads) == 2)
    first, second = store.recorder.loads
    assert (first.checkpoint, second.checkpoint) == (asked.digest, large.digest)
    assert second.queue_s >= first.read_s  # it waited as long as the other was read


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
async def test_another_user_is_refused(make_process: Make) -> None:
    store = make_process()
    await store.client()
    folder = store.log_path.parent
    for parent in (folder, *folder.parents):
        if not parent.stat().st_mode & stat.S_IXOTH:
            os.chmod(parent, 0o755)
    os.chmod(folder / "store.sock", 0o666)
    code = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        f"s.connect(sys.argv[1]); s.settimeout(20); s.send({protocol.encode(protocol.Hello())!r});"
        "print(s.recv(100))"
    )
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(folder / "store.sock")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await other.communicate()
    assert said.strip() == b"b''" or b"BrokenPipe" in said or b"ConnectionReset" in said
    assert "user 65534 is refused" in store.log_path.read_text()


async def test_two_agents_that_race_for_one_checkpoint_share_its_read(
    make_process: Make, make_checkpoint: Make
) -> None:
    store, made = make_process(), make_checkpoint(size_bytes=24 * MIB)
    await store.client()
    clients = []
    for _ in range(3):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(store.log_path.parent / "store.sock"))
        clients.append(StoreClient(sock, Recorder()))
    grants = await asyncio.gather(*(client.open(made.wanted()) for client in clients))
    for granted in grants:
        assert (await Feed(granted).all())[-1] == {"ready": 24}
        assert content_of(granted) == made.data
    await store.recorder.until(lambda: store.recorder.loads)
    assert len({granted.grant.generation for granted in grants}) == 1
    for client in clients:
        client.close()
    assert len(store.recorder.loads) == 1


async def test_a_deep_state_folder_is_no_obstacle(make_process: Make) -> None:
    store = make_process(folder="/".join(["deep" * 10] * 4))  # an address may have 107 bytes
    await store.client()
