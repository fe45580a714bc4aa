"""Ticket: one held request's line back to its gateway. The writer writes it, one stream reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sllm.controller.latest import Latest
from sllm.core.route import RouteTarget
from sllm.errors import SllmError
from sllm.rpc.routes import AcquireRequest, AcquireUpdate


class Ticket:
    def __init__(self, number: int, request: AcquireRequest) -> None:
        self.number = number
        self.request = request
        self._latest: Latest[AcquireUpdate | SllmError | None] = Latest(None)

    def progress(self, update: AcquireUpdate) -> None:
        self._latest.set(update)

    def grant(self, target: RouteTarget) -> None:
        self._latest.set(AcquireUpdate(target=target))

    def fail(self, error: SllmError) -> None:
        self._latest.set(error)

    async def updates(self) -> AsyncIterator[AcquireUpdate]:
        """Yield progress, the last one with the target. Raises the error that ended the wait."""
        async for value in self._latest.follow():
            if isinstance(value, SllmError):
                raise value
            if value is not None:
                yield value
                if value.target is not None:
                    return
