"""The route table, watched at the controller. The last one stays in force while the controller is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol, cast

from sllm.core.route import Route, RouteTable
from sllm.errors import SllmError, Unavailable
from sllm.rpc.routes import WatchRoutesRequest

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 2.0


class RouteSource(Protocol):
    def watch_routes(self, request: WatchRoutesRequest) -> AsyncIterator[RouteTable]: ...


class Routes:
    """The latest table, by deployment; whoever subscribed is called after each change."""

    def __init__(self, source: RouteSource, gateway: str) -> None:
        self._source = source
        self._gateway = gateway
        self._routes: dict[str, Route] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._change = asyncio.Event()
        self.epoch = 0
        self.known = False
        self.connected = False

    def get(self, name: str) -> Route | None:
        """Return the route of a deployment; one that is being deleted has none. Raises Unavailable."""
        self.check_known()
        return self._routes.get(name)

    def check_known(self) -> None:
        """Raise Unavailable while nothing was ever heard of the controller: no route is then no proof of anything."""
        if not self.known:
            raise Unavailable("this gateway has not reached its controller yet", retry_after_s=1.0)

    def all(self) -> list[Route]:
        return list(self._routes.values())

    def subscribe(self, callback: Callable[[], None]) -> None:
        self._subscribers.append(callback)

    async def changed(self, *, within_s: float) -> None:
        """Return after the next change, or when the time is over."""
        try:
            await asyncio.wait_for(self._change.wait(), within_s)
        except TimeoutError:
            return

    async def run(self) -> None:
        """Watch until cancelled."""
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                await self._watch()
            except SllmError as error:
                if self.connected or retry_s == _FIRST_RETRY_S:
                    log.warning("the route table is not being updated: %s", error.message)
            if self.connected:
                self.connected, retry_s = False, _FIRST_RETRY_S
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _watch(self) -> None:
        tables = self._source.watch_routes(WatchRoutesRequest(gateway=self._gateway))
        async with aclosing(cast(AsyncGenerator[RouteTable, None], tables)):
            async for table in tables:
                self._take(table)
        raise Unavailable("the controller ended the watch")

    def _take(self, table: RouteTable) -> None:
        if table.epoch < self.epoch:
            raise Unavailable(f"the controller of epoch {table.epoch} was replaced by that of epoch {self.epoch}")
        self.epoch = table.epoch
        self.known = self.connected = True
        self._routes = {route.deployment.spec.name: route for route in table.routes if not route.deployment.deleting}
        change, self._change = self._change, asyncio.Event()
        change.set()
        for callback in self._subscribers:
            callback()
