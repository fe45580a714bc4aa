"""The agent's end of one connection to a store process."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sllm.agent.store import protocol
from sllm.agent.store.channel import Channel, close_all
from sllm.agent.store.protocol import Malformed, Message
from sllm.core.grant import Grant
from sllm.core.priority import Priority
from sllm.errors import SllmError, Unavailable, error_from
from sllm.loader.memory.table import Entry

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to load: one partition of the checkpoint in `folder`, whose manifest has `digest`. `checkpoint` is the
    digest that it stands for, which is another one for a runtime layout."""

    digest: str
    checkpoint: str
    folder: str
    partition: int = 0
    priority: Priority = Priority.REQUEST
    deadline_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A grant with its two descriptors (sllm.core.grant), which are open until `close`."""

    grant: Grant
    lease_fd: int
    feed_fd: int

    def close(self) -> None:
        close_all((self.lease_fd, self.feed_fd))


class Listener(Protocol):
    """Who wants to know what the store process says of its own accord."""

    def changed(self) -> None: ...
    def loaded(self, loaded: protocol.Loaded) -> None: ...
    def damaged(self, damaged: protocol.Damaged) -> None: ...


class Died(Unavailable):
    """The store process ended before it answered: ask the next one."""


class StoreClient:
    """Takes over `sock`. `entries` mirrors the pool's table, by generation, and `kept_back_bytes` is its; `pool_fd` is
    the pool's descriptor, from the welcome on; all are still there after the store process has died."""

    def __init__(self, sock: socket.socket, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        self.entries: dict[int, Entry] = {}
        self.kept_back_bytes = 0
        self.pool_fd = -1
        self._listener = listener
        self._ids = itertools.count(1)
        self._welcome: asyncio.Future[protocol.Welcome] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self._pongs: list[asyncio.Future[None]] = []
        self._grants: dict[int, asyncio.Future[Granted]] = {}
        self._verifications: dict[int, tuple[asyncio.Future[None], Callable[[int, int], None]]] = {}
        self._channel = Channel(sock, self._take, self._end)
        self._channel.send(protocol.Hello())

    @property
    def is_closed(self) -> bool:
        return self._closed.done()

    async def welcome(self) -> protocol.Welcome:
        """Return what the store process says of itself, once `entries` and `pool_fd` are there. Raises Died."""
        return await asyncio.shield(self._welcome)

    async def closed(self) -> None:
        """Return when the store process is gone."""
        await asyncio.shield(self._closed)

    async def open(self, wanted: Wanted) -> Granted:
        """Ask for a grant and wait for it; the caller closes it. Raises what the load ended with, and Died."""
        number = next(self._ids)
        answer: asyncio.Future[Granted] = asyncio.get_running_loop().create_future()
        self._check_open()
        self._grants[number] = answer
        self._channel.send(
            protocol.Open(
                id=number,
                digest=wanted.digest,
                checkpoint=wanted.checkpoint,
                folder=wanted.folder,
                partition=wanted.partition,
                priority=wanted.priority,
                deadline_s=wanted.deadline_s,
            )
        )
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result().close()
            self._channel.send(protocol.Abandon(id=number))
            raise
        finally:
            self._grants.pop(number, None)

    async def verify(
        self, digest: str, folder: str, progress: Callable[[int, int], None], *, deep: bool = False
    ) -> None:
        """Verify the files in a folder, whose manifest has `digest`; `progress` gets done and total bytes.

        Raises what is wrong, and Died.
        """
        number = next(self._ids)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._check_open()
        self._verifications[number] = (answer, progress)
        self._channel.send(protocol.Verify(id=number, digest=digest, folder=folder, deep=deep))
        try:
            await asyncio.shield(answer)
        except asyncio.CancelledError:
            self._channel.send(protocol.Abandon(id=number))
            raise
        finally:
            self._verifications.pop(number, None)

    def raise_to(self, checkpoint: str, priority: Priority) -> None:
        """Let what is loaded of a checkpoint go by a better priority, if it is one."""
        self._channel.send(protocol.Raise(checkpoint=checkpoint, priority=priority))

    def forget(self, digest: str) -> None:
        self._channel.send(protocol.Forget(digest=digest))

    def ping(self) -> asyncio.Future[None]:
        """Ask for a sign of life. What is returned is done when it has come; it fails with Died."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._channel.closed:
            _fail(answer, _died())
        else:
            self._pongs.append(answer)
            self._channel.send(protocol.Ping())
        return answer

    def quit(self, *, keep: bool) -> None:
        """Tell the process to end, and whether another is to take over the pool."""
        self._channel.send(protocol.Quit(keep=keep))

    def close(self) -> None:
        """Leave it running. `pool_fd` is closed with this."""
        self._channel.close()
        self._end()
        if self.pool_fd >= 0:
            os.close(self.pool_fd)
            self.pool_fd = -1

    def _check_open(self) -> None:
        if self._channel.closed:
            raise _died()

    def _take(self, message: Message, fds: list[int]) -> None:
        match message:
            case protocol.Welcome():
                self._take_welcome(message, fds)
            case protocol.Granted():
                self._take_grant(message, fds)
            case protocol.Refused():
                self._take_refusal(message)
            case protocol.Verifying() if message.id in self._verifications:
                self._verifications[message.id][1](message.done_bytes, message.total_bytes)
            case protocol.Verified() if message.id in self._verifications:
                _set(self._verifications[message.id][0], None)
            case protocol.Pong() if self._pongs:
                _set(self._pongs.pop(0), None)
            case _:
                close_all(fds)
                self._take_news(message)

    def _take_news(self, message: Message) -> None:
        match message:
            case protocol.Holdings():
                self.kept_back_bytes = message.kept_back_bytes
                self._take_entries(message.entries)
            case protocol.Holds():
                self._take_entries([message.entry])
            case protocol.Kept():
                self.kept_back_bytes = message.kept_back_bytes
                self._listener.changed()
            case protocol.Gone():
                self.entries.pop(message.generation, None)
                self._listener.changed()
            case protocol.Loaded():
                self._listener.loaded(message)
            case protocol.Damaged():
                self._listener.damaged(message)
            case _:
                pass  # the answer to what was called off

    def _take_entries(self, rows: list[dict[str, Any]]) -> None:
        try:
            entries = [protocol.entry_from(values) for values in rows]
        except Malformed:
            self._channel.end()
            return
        self.entries.update((entry.generation, entry) for entry in entries)
        self._listener.changed()

    def _take_welcome(self, message: protocol.Welcome, fds: list[int]) -> None:
        if len(fds) == 1 and self.pool_fd < 0:
            self.pool_fd = fds[0]
            _set(self._welcome, message)
            self._listener.changed()
        else:
            close_all(fds)
            self._channel.end()

    def _take_grant(self, message: protocol.Granted, fds: list[int]) -> None:
        try:
            lease_fd, feed_fd = fds
            grant = protocol.grant_from(message.grant)
        except (Malformed, ValueError):  # ValueError: other than two descriptors
            close_all(fds)
            self._channel.end()
            return
        answer = self._grants.pop(message.id, None)
        if answer is None or answer.done():
            close_all(fds)  # nobody waits for it any more
        else:
            answer.set_result(Granted(grant=grant, lease_fd=lease_fd, feed_fd=feed_fd))

    def _take_refusal(self, message: protocol.Refused) -> None:
        error = error_from(message.reason, message.message, hint=message.hint)
        if message.id in self._grants:
            _fail(self._grants.pop(message.id), error)
        elif message.id in self._verifications:
            _fail(self._verifications[message.id][0], error)

    def _end(self) -> None:
        _set(self._closed, None)
        waiting: list[asyncio.Future[Any]] = [self._welcome, *self._grants.values(), *self._pongs]
        for answer in (*waiting, *(answer for answer, _ in self._verifications.values())):
            _fail(answer, _died())
        self._listener.changed()


def _died() -> Died:
    return Died("the store process died", hint="it is started again")


def _set(answer: asyncio.Future[T], value: T) -> None:
    if not answer.done():
        answer.set_result(value)


def _fail(answer: asyncio.Future[T], error: SllmError) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # seen, also when nobody waits
