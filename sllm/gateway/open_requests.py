"""All requests of this gateway that are not over: what is reported of them, and when there are none."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from sllm.core.ids import RequestId
from sllm.core.request import RequestRow
from sllm.gateway.request import OpenRequest


class OpenRequests:
    """Counts, per deployment, those that ended since the last report."""

    def __init__(self) -> None:
        self._requests: dict[RequestId, OpenRequest] = {}
        self._finished: Counter[str] = Counter()
        self._none = asyncio.Event()
        self._none.set()
        self._placed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: OpenRequest) -> None:
        self._requests[request.id] = request
        self._none.clear()

    def remove(self, request: OpenRequest) -> None:
        del self._requests[request.id]
        if request.prompts:  # else it never asked for an engine
            self._finished[request.deployment] += 1
        if not self._requests:
            self._none.set()

    def placed(self) -> None:
        """One of them runs somewhere since now: whoever waits for `news` has some."""
        self._placed.set()

    async def news(self, *, within_s: float) -> None:
        """Return once a request was placed since the last call, or after `within_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._placed.wait()
        self._placed.clear()

    def unfinished(self) -> list[OpenRequest]:
        """Return those that wait or run. One whose tokens have all come, but whose client reads slowly, is neither."""
        return [request for request in self._requests.values() if request.sequences]

    def rows(self) -> tuple[RequestRow, ...]:
        """Return what is reported of the unfinished ones."""
        return tuple(request.row() for request in self.unfinished())

    def take_finished(self) -> dict[str, int]:
        """Return how many requests ended since the last call, by deployment."""
        finished, self._finished = self._finished, Counter()
        return dict(finished)

    def give_back_finished(self, finished: dict[str, int]) -> None:
        """Undo `take_finished`: the report did not arrive."""
        self._finished.update(finished)

    async def none_left(self) -> None:
        """Return when all are over."""
        await self._none.wait()
