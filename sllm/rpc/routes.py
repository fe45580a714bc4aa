"""RouteService: what gateways ask of the controller. Not on the token path."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from sllm.core.ids import DeploymentName, RequestId
from sllm.core.request import RequestRow
from sllm.core.route import RouteTable, RouteTarget
from sllm.rpc import common_pb2, controller_pb2
from sllm.rpc.control import Empty
from sllm.rpc.transport import Client, Handlers, Method


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRoutesRequest:
    gateway: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireRequest:
    gateway: str
    request_id: RequestId
    deployment: DeploymentName
    timeout_s: float
    prompt_tokens: int = 0
    started_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireUpdate:
    """Progress while the request is held; the last update has the `target`, which then counts this request."""

    phase: str = ""
    progress: float | None = None
    target: RouteTarget | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportLoadRequest:
    """All open requests of a gateway, every second; what is not in it is over.

    `finished` counts, per deployment, the requests that ended since the last report: one that began and ended
    between two reports is traffic too. `incarnation` tells processes of one name apart.
    """

    gateway: str
    requests: tuple[RequestRow, ...] = ()
    finished: dict[str, int] = field(default_factory=dict)
    incarnation: str = ""


class RouteService(Protocol):
    """`acquire` raises NotFound, QueueFull, DeadlineExceeded, or why no replica could be started."""

    def watch_routes(self, request: WatchRoutesRequest) -> AsyncIterator[RouteTable]: ...
    def acquire(self, request: AcquireRequest) -> AsyncIterator[AcquireUpdate]: ...
    async def report_load(self, request: ReportLoadRequest) -> Empty: ...


NAME = "sllm.rpc.RouteService"
_c, _m = common_pb2, controller_pb2
WATCH_ROUTES = Method("WatchRoutes", WatchRoutesRequest, _m.WatchRoutesRequest, RouteTable, _c.RouteTable, "stream")
ACQUIRE = Method("Acquire", AcquireRequest, _m.AcquireRequest, AcquireUpdate, _m.AcquireUpdate, "stream")
REPORT_LOAD = Method("ReportLoad", ReportLoadRequest, _m.ReportLoadRequest, Empty, _c.Empty)


def handlers(implementation: RouteService) -> Handlers:
    """Return the service for `transport.serve`."""
    return Handlers(NAME, (WATCH_ROUTES, ACQUIRE, REPORT_LOAD), implementation)


class RouteClient(Client):
    """Client of RouteService."""

    service = NAME

    async def watch_routes(self, request: WatchRoutesRequest) -> AsyncIterator[RouteTable]:
        async with aclosing(self._stream(WATCH_ROUTES, request)) as stream:
            async for table in stream:
                yield table

    async def acquire(self, request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        async with aclosing(self._stream(ACQUIRE, request)) as stream:
            async for update in stream:
                yield update

    async def report_load(self, request: ReportLoadRequest) -> Empty:
        return await self._unary(REPORT_LOAD, request)
