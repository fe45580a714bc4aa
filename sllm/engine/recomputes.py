"""At the destination of migrations: the rounds that other engine hosts have asked for (paper §5).

A round is work for the engine's prefix cache and for nobody's stream, so it is no open request here: it ends when its
caller does, and whatever it has computed by then may be evicted like any other cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from sllm.core.ids import RequestId
from sllm.core.migration import Round
from sllm.engine.base import Output
from sllm.engine.thread import EngineThread
from sllm.errors import Cancelled, EngineFailed, QueueFull, SllmError
from sllm.failpoints import failpoint
from sllm.rpc.engine import RecomputeRequest

# Each takes a place in the engine's batch. A source has a bounded number under way; this bounds many sources.
MAX_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class _Open:
    request: RequestId
    done: asyncio.Future[Output]


class Recomputes:
    """`new_key` gives the engine's keys, which it shares with the open requests."""

    def __init__(self, thread: EngineThread, new_key: Callable[[], int]) -> None:
        self._thread = thread
        self._new_key = new_key
        self._open: dict[int, _Open] = {}

    async def run(self, request: RecomputeRequest) -> Round:
        """Have the engine compute the KV cache of a request's tokens. A newer round of a request replaces an older.

        `Round.seconds` counts from now, the wait for the engine included: a request that resumes here waits as well.
        Raises QueueFull, Cancelled if it is replaced, and what the engine raises; cancelling it frees the engine at
        once.
        """
        self.supersede(request.request_id)
        if len(self._open) >= MAX_AT_ONCE:
            raise QueueFull(f"{len(self._open)} recomputes are under way here already")
        began = time.monotonic()
        key, done = self._new_key(), asyncio.get_running_loop().create_future()
        self._open[key] = _Open(request.request_id, done)
        try:
            self._thread.recompute(key, list(request.token_ids), request.cache_salt)
            failpoint("recompute-begun")
            cached_tokens = _cached_tokens(await done)
        finally:
            if self._open.pop(key, None) is not None:
                self._thread.abort([key])
        failpoint("recompute-done")
        return Round(tokens=len(request.token_ids), cached_tokens=cached_tokens, seconds=time.monotonic() - began)

    def supersede(self, request: RequestId) -> None:
        """End the round of a request: a newer one follows, or the request itself."""
        self._fail(Cancelled(f"{request} has gone on"), {request})

    def fail_all(self, error: SllmError) -> None:
        self._fail(error, {each.request for each in self._open.values()})

    def _fail(self, error: SllmError, requests: set[RequestId]) -> None:
        for each in self._open.values():
            if each.request in requests and not each.done.done():
                each.done.set_exception(error)
                each.done.exception()  # seen, also if its caller is gone by now

    def take(self, outputs: list[Output]) -> list[Output]:
        """Take out of one engine step what belongs to rounds, and return the rest."""
        if not self._open:
            return outputs
        rest = []
        for output in outputs:
            round_ = self._open.get(output.key)
            if round_ is None:
                rest.append(output)
            elif output.finish is not None:
                del self._open[output.key]
                if not round_.done.done():
                    round_.done.set_result(output)
        return rest


def _cached_tokens(output: Output) -> int:
    if output.finish is not None and output.finish.error is not None:
        raise output.finish.error
    if output.prefill is None:
        raise EngineFailed("the engine did not say how much it recomputed")
    return output.prefill.num_cached_tokens
