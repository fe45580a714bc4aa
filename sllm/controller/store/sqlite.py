"""SqliteStore: the embedded StateStore. One connection, in one thread of its own; durable when a call returns.

One process at a time: the folder is locked (flock), because two connections that write and checkpoint at once can
corrupt the write-ahead log of the SQLite versions before 3.51.3.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sllm.controller.store.base import Compare, Item, Op, Put, TxnResult, WatchEvent
from sllm.controller.store.history import History
from sllm.errors import Conflict, InvalidConfiguration, SllmError
from sllm.linux import claim

SCHEMA_VERSION = 1
_FILE = "state.db"
_LOCK = "lock"

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, create_rev INTEGER NOT NULL, mod_rev INTEGER NOT NULL
) WITHOUT ROWID;
"""

T = TypeVar("T")


class SqliteStore:
    """Made by `open`; close it to give the lock back."""

    def __init__(self, thread: ThreadPoolExecutor, connection: sqlite3.Connection, lock: int, revision: int) -> None:
        self._thread = thread
        self._connection = connection
        self._lock = lock
        self._history = History(revision)

    @classmethod
    async def open(cls, folder: Path) -> SqliteStore:
        """Open or make the store. Raises Conflict if it is in use, or was made by a newer version,
        and InvalidConfiguration if it cannot be used, or is damaged."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        loop = asyncio.get_running_loop()
        try:
            lock = await loop.run_in_executor(thread, _locked, folder)
            try:
                connection, revision = await loop.run_in_executor(thread, _connected, folder / _FILE)
            except BaseException:
                os.close(lock)
                raise
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(thread, connection, lock, revision)

    async def get(self, key: str) -> Item | None:
        return await self._run(lambda: _get(self._connection, key))

    async def range(self, prefix: str) -> tuple[tuple[Item, ...], int]:
        return await self._run(lambda: _range(self._connection, prefix))

    async def txn(self, when: Sequence[Compare], then: Sequence[Op]) -> TxnResult:
        result, _ = await self._run(lambda: _txn(self._connection, when, then), self._record)
        return result

    def watch(self, prefix: str, *, from_rev: int) -> AsyncIterator[tuple[WatchEvent, ...]]:
        return self._history.watch(prefix, from_rev)

    async def close(self) -> None:
        await self._run(self._connection.close)
        self._thread.shutdown()
        os.close(self._lock)

    def _record(self, work: asyncio.Future[tuple[TxnResult, tuple[WatchEvent, ...]]]) -> None:
        if not work.cancelled() and not work.exception() and (events := work.result()[1]):
            self._history.append(events)

    async def _run(self, function: Callable[[], T], then: Callable[[asyncio.Future[T]], None] | None = None) -> T:
        work = asyncio.get_running_loop().run_in_executor(self._thread, function)
        if then:
            work.add_done_callback(then)
        try:
            # Shielded: a caller that is cancelled leaves, but what it wrote still reaches the watchers, in order.
            return await asyncio.shield(work)
        except sqlite3.Error as error:
            raise SllmError(
                f"the state store failed: {error}", hint="is the disk full, or the file damaged?"
            ) from error


def _locked(folder: Path) -> int:
    def taken(holder: str) -> Conflict:
        return Conflict(
            f"{folder} is in use by process {holder}", hint="only one controller may use a state folder; stop that one"
        )

    try:
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return claim(folder / _LOCK, taken)
    except OSError as error:
        raise InvalidConfiguration(f"cannot use state folder {folder}: {error.strerror}") from error


def _connected(file: Path) -> tuple[sqlite3.Connection, int]:
    connection = sqlite3.connect(file, isolation_level=None)
    try:
        _check_whole(connection)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            _create(connection)
        _check_version(connection, file)
        return connection, _revision(connection)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise InvalidConfiguration(
            f"cannot use the state in {file}: {error}", hint="restore a backup of it, or move it away to begin anew"
        ) from error
    except BaseException:
        connection.close()
        raise


def _check_whole(connection: sqlite3.Connection) -> None:
    (problem,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)


def _create(connection: sqlite3.Connection) -> None:
    connection.executescript(
        f"BEGIN; {_SCHEMA} INSERT INTO meta VALUES ('schema', {SCHEMA_VERSION}), ('revision', 0); COMMIT;"
    )


def _check_version(connection: sqlite3.Connection, file: Path) -> None:
    found = _number(connection, "schema")
    if found > SCHEMA_VERSION:
        raise Conflict(
            f"{file} has schema {found}, and this version knows {SCHEMA_VERSION} at most",
            hint="it was written by a newer sllm: use that version, or restore a backup",
        )


def _revision(connection: sqlite3.Connection) -> int:
    return _number(connection, "revision")


def _number(connection: sqlite3.Connection, name: str) -> int:
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise sqlite3.DatabaseError(f"its {name} is not there")
    return int(row[0])


def _get(connection: sqlite3.Connection, key: str) -> Item | None:
    row = connection.execute("SELECT key, value, create_rev, mod_rev FROM items WHERE key = ?", (key,)).fetchone()
    return _item(row) if row else None


def _item(row: tuple[str, bytes, int, int]) -> Item:
    return Item(key=row[0], value=row[1], create_rev=row[2], mod_rev=row[3])


def _range(connection: sqlite3.Connection, prefix: str) -> tuple[tuple[Item, ...], int]:
    rows = connection.execute(
        "SELECT key, value, create_rev, mod_rev FROM items WHERE key >= ?1 AND substr(key, 1, ?2) = ?1 ORDER BY key",
        (prefix, len(prefix)),
    )
    return tuple(_item(row) for row in rows), _revision(connection)


def _txn(
    connection: sqlite3.Connection, when: Sequence[Compare], then: Sequence[Op]
) -> tuple[TxnResult, tuple[WatchEvent, ...]]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        before = _revision(connection)
        if not all(_mod_rev(connection, c.key) == c.mod_rev for c in when):
            connection.execute("ROLLBACK")
            return TxnResult(succeeded=False, revision=before), ()
        events = tuple(event for op in then if (event := _apply(connection, op, before + 1)))
        revision = before + 1 if events else before
        connection.execute("UPDATE meta SET value = ? WHERE name = 'revision'", (revision,))
        connection.execute("COMMIT")
        return TxnResult(succeeded=True, revision=revision), events
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _mod_rev(connection: sqlite3.Connection, key: str) -> int:
    item = _get(connection, key)
    return item.mod_rev if item else 0


def _apply(connection: sqlite3.Connection, op: Op, revision: int) -> WatchEvent | None:
    if isinstance(op, Put):
        connection.execute(
            "INSERT INTO items VALUES (?1, ?2, ?3, ?3) "
            "ON CONFLICT (key) DO UPDATE SET value = excluded.value, mod_rev = excluded.mod_rev",
            (op.key, op.value, revision),
        )
        return WatchEvent(key=op.key, value=op.value, revision=revision)
    deleted = connection.execute("DELETE FROM items WHERE key = ?", (op.key,)).rowcount
    return WatchEvent(key=op.key, value=None, revision=revision) if deleted else None
