"""RouteService: what gateways ask."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

from sllm.controller.events import Asked, Left, Watched
from sllm.controller.inbox import Inbox
from sllm.controller.tickets import Ticket
from sllm.controller.world import World
from sllm.core.route import RouteTable
from sllm.rpc.control import Empty
from sllm.rpc.routes import AcquireRequest, AcquireUpdate, ReportLoadRequest, WatchRoutesRequest


class ControllerRoutes:
    """Implements rpc.routes.RouteService."""

    def __init__(self, world: World, inbox: Inbox) -> None:
        self._world = world
        self._inbox = inbox
        self._numbers = itertools.count(1)

    async def watch_routes(self, request: WatchRoutesRequest) -> AsyncIterator[RouteTable]:
        self._inbox.post(Watched(gateway=request.gateway, begins=True))
        try:
            async for table in self._world.table.follow():
                yield table
        finally:
            self._inbox.post(Watched(gateway=request.gateway, begins=False))

    async def acquire(self, request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        ticket = Ticket(next(self._numbers), request)
        served = False
        try:
            await self._inbox.submit(Asked(ticket=ticket))
            async for update in ticket.updates():
                yield update
                served = update.target is not None
        finally:
            # Behind `Asked` in the queue, so also what was cancelled before it was heard is taken back.
            self._inbox.post(Left(ticket=ticket.number, served=served))

    async def report_load(self, request: ReportLoadRequest) -> Empty:
        await self._inbox.submit(request)
        return Empty()
