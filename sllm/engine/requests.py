"""Whose request is whose: the open requests of an engine host, and the token streams that they came in on."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from sllm.core.tokens import Finish, FinishReason, StepOutputs, TokenOutput, TokenRequest
from sllm.engine.base import Output
from sllm.errors import InvalidArgument, SllmError, Unavailable

# A gateway that does not read for this many engine steps has a problem that more memory here would not solve.
MAX_UNREAD_STEPS = 8192


class Connection:
    """One gateway's token stream: its open requests by stream id, and the steps it has not read yet."""

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.keys: dict[int, int] = {}
        self._unread: deque[StepOutputs] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self._error: SllmError | None = None

    def send(self, step: StepOutputs) -> bool:
        """Queue a step. False: the reader is too far behind, and has lost its connection."""
        if len(self._unread) >= MAX_UNREAD_STEPS:
            self.close(Unavailable(f"gateway {self.gateway!r} is {MAX_UNREAD_STEPS} steps behind in reading"))
        if not self._closed:
            self._unread.append(step)
            self._changed.set()
        return not self._closed

    def close(self, error: SllmError | None = None) -> None:
        """End the stream after what is queued: normally, or by raising `error` at its reader."""
        if not self._closed:
            self._closed = True
            self._error = error
            self._changed.set()

    async def steps(self) -> AsyncIterator[StepOutputs]:
        """Yield steps until the connection is closed."""
        while True:
            while self._unread:
                yield self._unread.popleft()
            if self._closed:
                break
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error


@dataclass(slots=True)
class _Open:
    connection: Connection
    stream_id: int
    position: int


class Requests:
    """The table of open requests, by a key that is never used twice."""

    def __init__(self) -> None:
        self._open: dict[int, _Open] = {}
        self._connections: set[Connection] = set()
        self._keys = itertools.count(1)

    def __len__(self) -> int:
        return len(self._open)

    def connect(self, gateway: str) -> Connection:
        connection = Connection(gateway)
        self._connections.add(connection)
        return connection

    def disconnect(self, connection: Connection) -> list[int]:
        """Forget a connection and its requests; return their keys, for the engine to abort."""
        self._connections.discard(connection)
        return self.drop(connection, list(connection.keys))

    def open(self, connection: Connection, request: TokenRequest) -> int:
        """Enter a request and return its key. Raises InvalidArgument if its stream id is in use."""
        if request.stream_id in connection.keys:
            raise InvalidArgument(f"gateway {connection.gateway!r} used stream id {request.stream_id} twice")
        key = next(self._keys)
        self._open[key] = _Open(connection, request.stream_id, request.num_output_tokens)
        connection.keys[request.stream_id] = key
        return key

    def drop(self, connection: Connection, stream_ids: list[int]) -> list[int]:
        """Forget some requests of a connection; return the keys of those that were open."""
        keys = [connection.keys.pop(stream_id) for stream_id in stream_ids if stream_id in connection.keys]
        for key in keys:
            del self._open[key]
        return keys

    def deliver(self, outputs: list[Output], timestamp: float) -> list[int]:
        """Hand each connection its share of one engine step; what nobody waits for any more is dropped.

        Return the keys of requests that ended because their gateway does not read, for the engine to abort.
        """
        shares: dict[Connection, list[TokenOutput]] = {}
        for output in outputs:
            row = self._open.get(output.key)
            if row is not None:
                shares.setdefault(row.connection, []).append(self._advance(row, output))
        given_up: list[int] = []
        for connection, share in shares.items():
            steps = (StepOutputs(outputs=outputs, timestamp=timestamp) for outputs in _messages(share))
            if not all(connection.send(step) for step in steps):
                given_up += self.drop(connection, list(connection.keys))
        return given_up

    def _advance(self, row: _Open, output: Output) -> TokenOutput:
        position = row.position
        row.position += len(output.token_ids)
        if output.finish is not None:
            self.drop(row.connection, [row.stream_id])
        return TokenOutput(
            stream_id=row.stream_id,
            position=position,
            token_ids=output.token_ids,
            finish=output.finish,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            prefill=output.prefill,
        )

    def fail_all(self, error: SllmError, timestamp: float) -> list[int]:
        """End every open request with `error`; return their keys."""
        keys = list(self._open)
        finish = Finish(reason=FinishReason.ERROR, error=error)
        self.deliver([Output(key=key, token_ids=[], finish=finish) for key in keys], timestamp)
        return keys

    def close_all(self) -> None:
        """End every stream."""
        for connection in self._connections:
            connection.close()


def _messages(share: list[TokenOutput]) -> Iterator[list[TokenOutput]]:
    """Divide a step: outputs that may fill a message (see `sizes`) have one each."""
    yield from ([output] for output in share if output.prompt_logprobs is not None)
    if small := [output for output in share if output.prompt_logprobs is None]:
        yield small
