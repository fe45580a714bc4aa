"""At the destination of migrations: the rounds that other engine hosts have asked for (paper §5).

`sllm.migration.destination` says which are done and which dropped; this asks the engine and answers the callers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sllm.core.ids import RequestId
from sllm.core.migration import Round
from sllm.engine.base import Output
from sllm.errors import Cancelled, EngineFailed, QueueFull, SllmError
from sllm.failpoints import failpoint
from sllm.migration import destination
from sllm.migration.destination import Answer, Arrived, Asked, Closing, Compute, Computed, Destination, Drop, Refuse
from sllm.rpc.engine import RecomputeRequest


class Engine(Protocol):
    """What is needed of the engine thread."""

    def recompute(self, key: int, token_ids: list[int], cache_salt: str) -> None: ...
    def abort(self, keys: list[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Call:
    request: RecomputeRequest
    done: asyncio.Future[Output]


class Recomputes:
    """`new_key` gives the engine's keys, which it shares with the open requests."""

    def __init__(self, engine: Engine, new_key: Callable[[], int]) -> None:
        self._engine = engine
        self._new_key = new_key
        self._state = Destination()
        self._calls: dict[int, _Call] = {}

    async def run(self, request: RecomputeRequest) -> Round:
        """Have the engine compute the KV cache of a request's tokens. A newer round of a request replaces an older.

        `Round.seconds` counts from now, the wait for the engine included: a request that resumes here waits as well.
        Raises QueueFull, Cancelled if it is replaced, and what the engine raises; cancelling it frees the engine at
        once.
        """
        began = time.monotonic()
        key, call = self._new_key(), _Call(request, asyncio.get_running_loop().create_future())
        self._calls[key] = call
        try:
            self._feed(
                Asked(request=request.request_id, key=key), Cancelled(f"{request.request_id} sent a newer round")
            )
            failpoint("recompute-begun")
            cached_tokens = _cached_tokens(await call.done)
        finally:
            del self._calls[key]
            if self._state.key_of(request.request_id) == key:  # the caller is gone
                self.drop(request.request_id)
        failpoint("recompute-done")
        return Round(tokens=len(request.token_ids), cached_tokens=cached_tokens, seconds=time.monotonic() - began)

    def drop(self, request: RequestId) -> None:
        """A request needs no round any more: it is here itself, or its source is gone."""
        self._feed(Arrived(request=request), Cancelled(f"{request} goes on here already"))

    def close(self, error: SllmError) -> None:
        """End all rounds with an error."""
        self._feed(Closing(), error)

    def take(self, outputs: list[Output]) -> list[Output]:
        """Take out of one engine step what belongs to rounds, and return the rest."""
        if not self._calls:
            return outputs
        for output in outputs:
            if output.key in self._calls and output.finish is not None:
                self._computed(output)
        return [output for output in outputs if output.key not in self._calls]

    def _computed(self, output: Output) -> None:
        self._state, effects = destination.step(self._state, Computed(key=output.key))
        call = self._calls[output.key]
        if Answer(key=output.key) in effects and not call.done.done():
            call.done.set_result(output)

    def _feed(self, event: destination.Event, error: SllmError) -> None:
        """`error` is for the callers whose rounds this event ends."""
        self._state, effects = destination.step(self._state, event)
        for effect in effects:
            match effect:
                case Compute(key=key):
                    asked = self._calls[key].request
                    self._engine.recompute(key, list(asked.token_ids), asked.cache_salt)
                case Drop(key=key):
                    self._engine.abort([key])
                    self._fail(key, error)
                case Refuse(key=key):
                    self._fail(key, QueueFull("too many rounds are under way here already"))

    def _fail(self, key: int, error: SllmError) -> None:
        call = self._calls.get(key)
        if call is not None and not call.done.done():
            call.done.set_exception(error)


def _cached_tokens(output: Output) -> int:
    if output.finish is not None and output.finish.error is not None:
        raise output.finish.error
    if output.prefill is None:
        raise EngineFailed("the engine did not say how much it recomputed")
    return output.prefill.num_cached_tokens
