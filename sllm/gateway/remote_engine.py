"""What a front end has in place of an engine: sequences go out to the dispatcher, steps come back, all as values.

It belongs to one front end. Which request a sequence is for is known from the context in which the front end asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from sllm.errors import SllmError
from sllm.gateway.journal import Journal
from sllm.gateway.request import Batch, OpenRequest, Sequence, current_request


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A sequence as its front end asks for it: `key` is the front end's name of it, `sampling_params` is JSON.

    `max_tokens` bounds its output; 0: it is not known.
    """

    key: str
    prompt: list[int]
    sampling_params: bytes
    cache_salt: str = ""
    arrival_time: float = 0.0
    reasoning_ended: bool | None = None
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Outputs that came at once: of one engine step, in the usual case."""

    batch: Batch
    timestamp: float


class Submitter(Protocol):
    """The dispatcher, as far as it is needed here."""

    def submit(self, sequence: Sequence) -> None: ...
    def abort(self, sequences: Iterable[Sequence]) -> None: ...
    def fail(self, request: OpenRequest, error: SllmError) -> None: ...


class RemoteEngine:
    """`add` and `abort` return at once; all that happens to a sequence, failure too, comes out of `step`."""

    def __init__(self, dispatcher: Submitter) -> None:
        self._dispatcher = dispatcher
        self._sequences: dict[str, Sequence] = {}
        self._steps: asyncio.Queue[Step] = asyncio.Queue()

    def add(self, order: Order) -> None:
        sequence = Sequence(
            key=order.key,
            request=current_request.get(),
            sink=self,
            journal=Journal(prompt=order.prompt),
            sampling_params=order.sampling_params,
            cache_salt=order.cache_salt,
            arrival_time=order.arrival_time,
            reasoning_ended=order.reasoning_ended,
            max_tokens=order.max_tokens,
        )
        self._sequences[order.key] = sequence
        self._dispatcher.submit(sequence)

    def refuse(self, order: Order, error: SllmError) -> None:
        """Fail the request of an order that no engine could carry out."""
        self._dispatcher.fail(current_request.get(), error)
        self.add(order)

    def abort(self, keys: Iterable[str]) -> None:
        known = [self._sequences.pop(key, None) for key in keys]
        self._dispatcher.abort([sequence for sequence in known if sequence is not None])

    def put(self, batch: Batch, timestamp: float) -> None:
        for key, output in batch:
            if output.finish is not None:
                self._sequences.pop(key, None)
        self._steps.put_nowait(Step(batch, timestamp))

    async def step(self) -> Step:
        return await self._steps.get()
