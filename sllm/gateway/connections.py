"""Token streams to engine hosts: one per host and gateway process, shared by all front ends.

Each step that arrives is checked against the journals and handed on, one batch per front end. What a broken stream
means for the requests on it is not decided here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable
from typing import Protocol

from sllm.core.ids import ReplicaId
from sllm.core.route import RouteTarget
from sllm.core.tokens import (
    PROTOCOL_VERSION,
    AbortRequests,
    FinishReason,
    OpenStream,
    StepOutputs,
    TokenOutput,
    TokenRequest,
)
from sllm.errors import EngineFailed, SllmError
from sllm.gateway.request import Batch, Sequence, Sink
from sllm.rpc.engine import EngineClient
from sllm.rpc.transport import Tls

log = logging.getLogger(__name__)

_FAILED = (FinishReason.ABORT, FinishReason.ERROR)


class Listener(Protocol):
    """Is told how sequences end. `connection` is the one it happened on."""

    def finished(self, sequence: Sequence) -> None: ...
    def failed(self, sequence: Sequence, connection: Connection, error: SllmError) -> None: ...


class Connection:
    """The token stream to one engine host. Sequences on it have their `connection` and `stream_id` set."""

    def __init__(self, target: RouteTarget, *, gateway: str, tls: Tls | None, listener: Listener) -> None:
        self.target = target
        self.broken = False
        self._listener = listener
        self._live: dict[int, Sequence] = {}
        self._ids = itertools.count(1)
        self._client = EngineClient(target.address, tls, peer=f"the engine host of {target.replica}")
        self._stream = self._client.open_stream(
            OpenStream(protocol_version=PROTOCOL_VERSION, gateway=gateway, generation=target.generation)
        )
        self._reader = asyncio.create_task(self._read())

    @property
    def idle(self) -> bool:
        return not self._live

    def start(self, sequence: Sequence) -> None:
        """Send a sequence to the engine; one that has had output before is resumed."""
        sequence.connection, sequence.stream_id = self, next(self._ids)
        self._live[sequence.stream_id] = sequence
        journal = sequence.journal
        self._stream.send(
            TokenRequest(
                stream_id=sequence.stream_id,
                request_id=sequence.request.id,
                token_ids=journal.prompt + journal.tokens,
                num_output_tokens=len(journal.tokens),
                sampling_params=sequence.sampling_params,
                cache_salt=sequence.cache_salt,
                arrival_time=sequence.arrival_time,
                reasoning_ended=sequence.reasoning_ended,
            )
        )

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Stop sequences at once; nothing more is heard of them."""
        ids = [s.stream_id for s in sequences if s.connection is self]
        for stream_id in ids:
            self._forget(self._live[stream_id])
        if ids and not self.broken:
            self._stream.send(AbortRequests(stream_ids=ids))

    async def close(self) -> None:
        self._reader.cancel()
        await self._stream.close()
        await self._client.close()

    def _forget(self, sequence: Sequence) -> None:
        self._live.pop(sequence.stream_id, None)
        sequence.connection = None

    async def _read(self) -> None:
        error: SllmError
        try:
            async for step in self._stream.steps():
                self._take(step)
            return
        except SllmError as failed:
            error = failed
        except Exception:
            log.exception("reading the token stream of %s failed", self.target.replica)
            error = EngineFailed(f"the token stream of {self.target.replica} could not be read")
        self._break(error)

    def _break(self, error: SllmError) -> None:
        self.broken = True
        lost = list(self._live.values())
        for sequence in lost:
            self._forget(sequence)
        for sequence in lost:
            self._listener.failed(sequence, self, error)

    def _take(self, step: StepOutputs) -> None:
        batches: dict[Sink, Batch] = {}
        ended: list[tuple[Sequence, SllmError | None]] = []
        for output in step.outputs:
            sequence = self._live.get(output.stream_id)
            if sequence is None:  # aborted meanwhile
                continue
            try:
                fresh = sequence.journal.accept(output)
            except EngineFailed as gap:
                ended.append((sequence, gap))
                continue
            if fresh is None:
                continue
            error = None
            if fresh.finish is not None:
                error = _failure(fresh)
                ended.append((sequence, error))
            if error is None:
                batches.setdefault(sequence.sink, []).append((sequence.key, fresh))
        for sink, batch in batches.items():
            sink.put(batch, step.timestamp)
        for sequence, error in ended:
            self._end(sequence, error)

    def _end(self, sequence: Sequence, error: SllmError | None) -> None:
        if sequence.connection is not self:  # ended with another one of its request
            return
        if error is None:
            self._forget(sequence)
            self._listener.finished(sequence)
            return
        self.abort([sequence])
        self._listener.failed(sequence, self, error)


def _failure(output: TokenOutput) -> SllmError | None:
    finish = output.finish
    if finish is None or finish.reason not in _FAILED:
        return None
    if finish.error is not None:
        return finish.error
    return EngineFailed(f"the engine gave up the request: {finish.reason.name.lower()}")


class Connections:
    """The open connections, by replica."""

    def __init__(self, *, gateway: str, tls: Tls | None) -> None:
        self._gateway = gateway
        self._tls = tls
        self._open: dict[ReplicaId, Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def to(self, target: RouteTarget, listener: Listener) -> Connection:
        """Return the connection to a replica, opening it if there is none.

        There is no await in here: two first requests at once get the same one.
        """
        connection = self._open.get(target.replica)
        if connection is not None and not connection.broken and connection.target.generation == target.generation:
            return connection
        if connection is not None:
            self._close(connection)
        connection = Connection(target, gateway=self._gateway, tls=self._tls, listener=listener)
        self._open[target.replica] = connection
        return connection

    def keep(self, replicas: set[ReplicaId]) -> None:
        """Close the connections that nothing runs on and that are to none of these."""
        for replica, connection in list(self._open.items()):
            if connection.broken or (replica not in replicas and connection.idle):
                del self._open[replica]
                self._close(connection)

    def _close(self, connection: Connection) -> None:
        task = asyncio.create_task(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all."""
        for connection in self._open.values():
            self._close(connection)
        self._open.clear()
        if self._closing:
            await asyncio.wait(self._closing)
