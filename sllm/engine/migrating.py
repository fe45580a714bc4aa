"""At the source of migrations: carries out its agent's orders (paper §5). When to hand over is not decided here."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from sllm.core.ids import RequestId
from sllm.core.migration import MigrationOrder, MigrationReport, MigrationState
from sllm.engine.requests import Requests
from sllm.engine.thread import EngineThread
from sllm.failpoints import failpoint


class Migrations:
    """Moves open requests of one engine host to others."""

    def __init__(self, requests: Requests, thread: EngineThread) -> None:
        self._requests = requests
        self._thread = thread

    async def run(self, order: MigrationOrder) -> AsyncGenerator[MigrationReport, None]:
        """Yield each change of each request's migration."""
        failpoint("migrate-begin")
        for request in order.requests or self._requests.ids:
            yield self._hand_over(order, request)

    def _hand_over(self, order: MigrationOrder, request: RequestId) -> MigrationReport:
        """In one piece: nothing may come of the request here once its gateway has been told that it goes on there."""
        sequences = self._requests.sequences(request)
        failpoint("before-handover")
        self._thread.abort(self._requests.hand_over(request, order.target, time.monotonic(), self._thread.steps))
        failpoint("after-handover")
        return MigrationReport(
            migration=order.id,
            request=request,
            state=MigrationState.MOVED if sequences else MigrationState.FINISHED,
            prompt_tokens=sum(each.num_prompt_tokens for each in sequences[:1]),
            output_tokens=sum(each.position for each in sequences),
        )
