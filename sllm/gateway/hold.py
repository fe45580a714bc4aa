"""Asks the controller for a replica, for a request that none has room for; the controller holds it until there is one.

While the controller is away the request goes on waiting, until its deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol, cast

from sllm.core.route import RouteTarget
from sllm.errors import DeadlineExceeded, QueueFull, Unavailable
from sllm.gateway.request import OpenRequest
from sllm.gateway.routes import Routes
from sllm.rpc.routes import AcquireRequest, AcquireUpdate

_FIRST_RETRY_S = 0.2
_LAST_RETRY_S = 2.0
# The controller keeps the deadline itself; this is for one that does not answer any more.
_SLACK_S = 5.0


class Acquirer(Protocol):
    def acquire(self, request: AcquireRequest) -> AsyncIterator[AcquireUpdate]: ...


class Hold:
    """`acquire` returns a target that counts this request, or raises why there will be none."""

    def __init__(self, controller: Acquirer, routes: Routes, *, gateway: str) -> None:
        self._controller = controller
        self._routes = routes
        self._gateway = gateway

    async def acquire(self, request: OpenRequest) -> RouteTarget:
        waiting_since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(request.deadline + _SLACK_S):
                return await self._until_answered(request)
        except TimeoutError:
            waited_s = request.deadline - waiting_since
            raise DeadlineExceeded(f"{request.deployment!r}: no replica had room within {waited_s:.0f} s") from None

    async def _until_answered(self, request: OpenRequest) -> RouteTarget:
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                return await self._ask(request)
            except (Unavailable, QueueFull) as error:
                if isinstance(error, QueueFull) and not request.output_tokens:
                    raise  # its client may try elsewhere; one with half an answer cannot
                if request.deadline - asyncio.get_running_loop().time() < retry_s:
                    raise
                request.phase, request.progress = f"waiting: {error.message}", None
            await self._routes.changed(within_s=retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _ask(self, request: OpenRequest) -> RouteTarget:
        left_s = request.deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise DeadlineExceeded(f"{request.deployment!r}: no replica had room in time")
        updates = self._controller.acquire(
            AcquireRequest(
                gateway=self._gateway,
                request_id=request.id,
                deployment=request.deployment,
                timeout_s=left_s,
                prompt_tokens=request.prompt_tokens,
                started_at=request.started_at,
            )
        )
        async with aclosing(cast(AsyncGenerator[AcquireUpdate, None], updates)):
            async for update in updates:
                request.phase, request.progress = update.phase or request.phase, update.progress
                if update.target is not None:
                    return update.target
        raise Unavailable("the controller ended the wait without an answer")
