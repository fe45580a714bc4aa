"""The token stream to one engine host, shared by all front ends of this process.

Each step that arrives is checked against the journals and handed on, one batch per front end. What a broken stream, or
a request that has moved, means for the requests on it is not decided here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable
from typing import Protocol

from sllm.core.route import RouteTarget
from sllm.core.tokens import (
    PROTOCOL_VERSION,
    AbortRequests,
    FinishReason,
    Moved,
    OpenStream,
    StepOutputs,
    TokenOutput,
    TokenRequest,
)
from sllm.errors import EngineFailed, SllmError, StaleGeneration
from sllm.gateway.liveness import Liveness
from sllm.gateway.request import Batch, OpenRequest, Sequence, Sink
from sllm.rpc.engine import EngineClient
from sllm.rpc.transport import Tls

log = logging.getLogger(__name__)

_FAILED = (FinishReason.ABORT, FinishReason.ERROR)


class Listener(Protocol):
    """Is told how sequences end, and which requests go on elsewhere. `connection` is the one it happened on.

    A sequence that `failed` has no connection any more; of a request that `moved` some may still have one.
    """

    def finished(self, sequence: Sequence) -> None: ...
    def failed(self, sequence: Sequence, connection: Connection, error: SllmError) -> None: ...
    def moved(self, request: OpenRequest, connection: Connection, target: RouteTarget) -> None: ...


class Connection:
    """Sequences on it have their `connection` and `stream_id` set. A `broken` one is of no more use.

    A host that is silent for `silence_s`, or whose engine makes no step for `stall_s`, breaks it, if sequences run.
    """

    def __init__(
        self,
        target: RouteTarget,
        *,
        gateway: str,
        tls: Tls | None,
        listener: Listener,
        silence_s: float,
        stall_s: float,
    ) -> None:
        self.target = target
        self.broken = False
        self._listener = listener
        self._live: dict[int, Sequence] = {}
        self._ids = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self._liveness = Liveness(silence_s=silence_s, stall_s=stall_s, now=self._loop.time())
        self._watch: asyncio.TimerHandle | None = None
        self._client = EngineClient(target.address, tls, peer=f"the engine host of {target.replica}")
        self._stream = self._client.open_stream(
            OpenStream(protocol_version=PROTOCOL_VERSION, gateway=gateway, generation=target.generation)
        )
        self._reader = asyncio.create_task(self._read())

    @property
    def idle(self) -> bool:
        return not self._live

    @property
    def reached(self) -> bool:
        """Whether the host may have got what was sent to it."""
        return self._stream.reached

    def start(self, sequence: Sequence) -> None:
        """Send a sequence to the engine; one that has had output before is resumed."""
        if self.idle:
            self._liveness.begin(self._loop.time())
        sequence.connection, sequence.stream_id = self, next(self._ids)
        sequence.pace.pause()
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
        if self._watch is None:
            self._watch = self._loop.call_at(self._liveness.due_at, self._look)

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Stop sequences at once; nothing more is heard of them."""
        ids = [s.stream_id for s in sequences if s.connection is self]
        for stream_id in ids:
            self._forget(self._live[stream_id])
        if ids and not self.broken:
            self._stream.send(AbortRequests(stream_ids=ids))

    async def close(self) -> None:
        if self._live:  # a host of another generation has taken its place
            self._break(StaleGeneration(f"{self.target.replica} was replaced"))
        self._stop_watching()
        self._reader.cancel()
        await self._stream.close()
        await self._client.close()

    def _forget(self, sequence: Sequence) -> None:
        self._live.pop(sequence.stream_id, None)
        sequence.connection = None

    # --- its end -----------------------------------------------------------------------------

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
        finally:
            await self._stream.close()  # a host that lives ends what it still runs for us
        self._break(error)

    def _look(self) -> None:
        """Look whether the host is dead, when it may be; nobody looks while nothing runs there."""
        self._watch = None
        if self.idle:
            return
        error = self._liveness.problem(self._loop.time())
        if error is None:
            self._watch = self._loop.call_at(self._liveness.due_at, self._look)
            return
        self._reader.cancel()
        self._break(error)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _break(self, error: SllmError) -> None:
        self.broken = True
        self._stop_watching()
        lost = list(self._live.values())
        for sequence in lost:
            self._forget(sequence)
        for sequence in lost:
            self._listener.failed(sequence, self, error)

    # --- steps -------------------------------------------------------------------------------

    def _take(self, step: StepOutputs) -> None:
        now = self._loop.time()
        self._liveness.heard(step.steps, now)
        self._take_outputs(step, now)
        if step.moves:
            self._take_moves(step.moves)

    def _take_outputs(self, step: StepOutputs, now: float) -> None:
        batches: dict[Sink, Batch] = {}
        ended: list[tuple[Sequence, SllmError | None]] = []
        for output in step.outputs:
            sequence = self._live.get(output.stream_id)
            if sequence is None:  # aborted meanwhile, or gone elsewhere
                continue
            try:
                fresh = sequence.journal.accept(output)
            except EngineFailed as gap:
                ended.append((sequence, gap))
                continue
            if fresh is None:
                continue
            sequence.pace.advance(len(fresh.token_ids), now)
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

    def _take_moves(self, moves: Iterable[Moved]) -> None:
        """Let go of sequences whose request goes on elsewhere. One whose tokens are not all here has failed instead."""
        leaving: dict[OpenRequest, RouteTarget] = {}
        for move in moves:
            sequence = self._live.get(move.stream_id)
            if sequence is None:  # aborted meanwhile
                continue
            self._forget(sequence)
            have = len(sequence.journal.tokens)
            if move.position == have:
                leaving[sequence.request] = move.target
            else:
                gap = EngineFailed(f"it moved at token {move.position}, but {have} have come")
                self._listener.failed(sequence, self, gap)
        for request, target in leaving.items():
            self._listener.moved(request, self, target)


def _failure(output: TokenOutput) -> SllmError | None:
    finish = output.finish
    if finish is None or finish.reason not in _FAILED:
        return None
    if finish.error is not None:
        return finish.error
    return EngineFailed(f"the engine gave up the request: {finish.reason.name.lower()}")
