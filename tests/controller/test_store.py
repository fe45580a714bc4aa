"""One suite for every StateStore; then what only the durable one can do."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from contextlib import aclosing

import pytest

from sllm.controller.store.base import Compare, Delete, Put, WatchEvent
from sllm.controller.store.history import History
from sllm.controller.store.memory import MemoryStore
from sllm.controller.store.sqlite import SCHEMA_VERSION, SqliteStore
from sllm.errors import Conflict, InvalidConfiguration


@pytest.fixture(params=["memory", "sqlite"])
async def store(request, tmp_path):
    opened = MemoryStore() if request.param == "memory" else await SqliteStore.open(tmp_path / "store")
    yield opened
    await opened.close()


async def put(store, **values):
    return await store.txn([], [Put(key=key, value=value.encode()) for key, value in values.items()])


async def test_what_was_put_is_found_with_its_revisions(store):
    await put(store, a="1")
    await put(store, b="1")
    await put(store, a="2")
    item = await store.get("a")
    assert (item.value, item.create_rev, item.mod_rev) == (b"2", 1, 3)
    assert await store.get("c") is None


async def test_a_range_is_ordered_and_has_only_its_prefix(store):
    await store.txn([], [Put(key=key, value=b"") for key in ("n/b", "n/a", "n", "m/z", "n/é", "na", "n%x")])
    items, revision = await store.range("n/")
    assert [item.key for item in items] == ["n/a", "n/b", "n/é"]
    assert revision == 1
    assert len((await store.range(""))[0]) == 7


async def test_a_transaction_is_one_revision(store):
    result = await put(store, a="1", b="2")
    assert (result.succeeded, result.revision) == (True, 1)
    assert {item.mod_rev for item in (await store.range(""))[0]} == {1}


async def test_nothing_is_done_if_a_comparison_fails(store):
    await put(store, a="1")
    stale = [Compare(key="a", mod_rev=1), Compare(key="b", mod_rev=7)]
    result = await store.txn(stale, [Put(key="a", value=b"2"), Delete(key="a")])
    assert (result.succeeded, result.revision) == (False, 1)
    assert (await store.get("a")).value == b"1"


async def test_compares_with_the_last_write_and_with_absence(store):
    absent = [Compare(key="a", mod_rev=0)]
    assert (await store.txn(absent, [Put(key="a", value=b"1")])).succeeded
    assert not (await store.txn(absent, [Put(key="a", value=b"2")])).succeeded
    assert (await store.txn([Compare(key="a", mod_rev=1)], [Delete(key="a")])).succeeded
    assert (await store.txn(absent, [Put(key="a", value=b"3")])).succeeded
    assert (await store.get("a")).create_rev == 3


async def test_a_transaction_that_changes_nothing_makes_no_revision(store):
    await put(store, a="1")
    assert (await store.txn([], [Delete(key="zz")])).revision == 1
    assert (await store.txn([], [])).revision == 1


async def test_concurrent_compare_and_set_has_one_winner(store):
    race = [store.txn([Compare(key="a", mod_rev=0)], [Put(key="a", value=b"%d" % i)]) for i in range(20)]
    assert sum(result.succeeded for result in await asyncio.gather(*race)) == 1


async def test_a_watch_has_no_gap_from_history_into_the_present(store):
    for i in range(3):
        await put(store, **{f"k{i}": str(i)})
    seen = []
    async with aclosing(store.watch("k", from_rev=2)) as watch:
        async for events in watch:
            seen += events
            if len(seen) == 2:
                # While the watcher is busy with the last event:
                await put(store, k3="3")
                await put(store, other="x")
                await store.txn([], [Delete(key="k0"), Put(key="k4", value=b"4")])
            if len(seen) == 5:
                break
    assert [(e.key, e.value, e.revision) for e in seen] == [
        ("k1", b"1", 2),
        ("k2", b"2", 3),
        ("k3", b"3", 4),
        ("k0", None, 6),
        ("k4", b"4", 6),
    ]


async def test_a_watch_waits_for_what_is_to_come(store):
    async with aclosing(store.watch("", from_rev=1)) as watch:
        coming = asyncio.ensure_future(anext(watch))
        await put(store, a="1")
        assert await coming == (WatchEvent(key="a", value=b"1", revision=1),)


async def test_a_watch_from_the_future_waits_for_it(store):
    async with aclosing(store.watch("", from_rev=2)) as watch:
        coming = asyncio.ensure_future(anext(watch))
        await put(store, a="1")
        await put(store, b="2")
        assert (await coming)[0].key == "b"


async def test_two_watchers_see_the_same(store):
    async def first_three():
        seen = []
        async with aclosing(store.watch("", from_rev=1)) as watch:
            async for events in watch:
                seen += events
                if len(seen) == 3:
                    return seen
        return None

    watchers = [asyncio.ensure_future(first_three()) for _ in range(2)]
    for i in range(3):
        await put(store, **{f"k{i}": ""})
    one, other = await asyncio.gather(*watchers)
    assert one == other


async def test_a_watch_of_forgotten_revisions_says_so():
    history = History(0, kept=2)
    for revision in range(1, 5):
        history.append((WatchEvent(key="k", value=b"", revision=revision),))
    with pytest.raises(Conflict, match="oldest is 3"):
        await anext(history.watch("", 2))
    assert (await anext(history.watch("", 3)))[0].revision == 3


# -- durable


async def test_everything_is_there_after_a_restart(tmp_path):
    store = await SqliteStore.open(tmp_path)
    await put(store, a="1", b="2")
    await store.txn([], [Delete(key="a")])
    await store.close()
    store = await SqliteStore.open(tmp_path)
    items, revision = await store.range("")
    assert [(item.key, item.value, item.mod_rev) for item in items] == [("b", b"2", 1)]
    assert revision == 2
    with pytest.raises(Conflict):
        await anext(store.watch("", from_rev=1))
    await store.close()


async def test_what_was_answered_survives_a_kill(tmp_path):
    program = (
        "import asyncio, os, pathlib, sys\n"
        "from sllm.controller.store.sqlite import SqliteStore\n"
        "from sllm.controller.store.base import Put\n"
        "async def main():\n"
        "    store = await SqliteStore.open(pathlib.Path(sys.argv[1]))\n"
        "    await store.txn([], [Put(key='a', value=b'1')])\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -9
    store = await SqliteStore.open(tmp_path)
    assert (await store.get("a")).value == b"1"
    await store.close()


async def test_a_second_opener_is_refused_and_told_who_has_it(tmp_path):
    store = await SqliteStore.open(tmp_path)
    with pytest.raises(Conflict, match=f"in use by process {os.getpid()}"):
        await SqliteStore.open(tmp_path)
    await store.close()
    await (await SqliteStore.open(tmp_path)).close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path):
    await (await SqliteStore.open(tmp_path)).close()
    connection = sqlite3.connect(tmp_path / "state.db")
    connection.execute("UPDATE meta SET value = ? WHERE name = 'schema'", (SCHEMA_VERSION + 1,))
    connection.commit()
    connection.close()
    for _ in range(2):  # the lock is given back
        with pytest.raises(Conflict, match="newer|schema"):
            await SqliteStore.open(tmp_path)


async def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfiguration, match="file/store"):
        await SqliteStore.open(tmp_path / "file" / "store")


async def test_a_writer_that_is_cancelled_still_reaches_the_watchers(tmp_path):
    store = await SqliteStore.open(tmp_path)
    writing = asyncio.ensure_future(put(store, a="1"))
    await asyncio.sleep(0)
    writing.cancel()
    await put(store, b="2")
    async with aclosing(store.watch("", from_rev=1)) as watch:
        assert [(await anext(watch))[0].key for _ in range(2)] == ["a", "b"]
    await store.close()


async def test_the_folder_is_private(tmp_path):
    store = await SqliteStore.open(tmp_path / "store")
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
    await store.close()


@pytest.mark.parametrize("damage", ["no database", "a hole", "a table without its rows"])
async def test_a_damaged_file_is_named(tmp_path, damage):
    store = await SqliteStore.open(tmp_path)
    for i in range(50):
        await put(store, **{f"key{i}": "x" * 1000})
    await store.close()
    file = tmp_path / "state.db"
    if damage == "no database":
        file.write_bytes(b"this is no database" * 1000)
    elif damage == "a hole":
        content = bytearray(file.read_bytes())
        content[8192:] = b"\xff" * (len(content) - 8192)
        file.write_bytes(content)
    else:
        connection = sqlite3.connect(file)
        connection.execute("DELETE FROM meta")
        connection.commit()
        connection.close()
    for _ in range(2):  # the lock is given back
        with pytest.raises(InvalidConfiguration, match=r"state\.db") as caught:
            await SqliteStore.open(tmp_path)
        assert "backup" in caught.value.hint


async def test_few_revisions_are_kept_while_nobody_watches():
    history = History(0, kept=50, kept_unwatched=2)

    def write(first, last):
        for revision in range(first, last + 1):
            history.append((WatchEvent(key="k", value=b"", revision=revision),))

    write(1, 5)
    with pytest.raises(Conflict, match="oldest is 4"):
        await anext(history.watch("", 3))
    async with aclosing(history.watch("", 4)) as watch:
        assert (await anext(watch))[0].revision == 4
        write(6, 20)
        assert [(await anext(watch))[0].revision for _ in range(16)] == list(range(5, 21))
    with pytest.raises(Conflict, match="oldest is 19"):
        await anext(history.watch("", 18))
