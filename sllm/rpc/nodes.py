"""NodeService: how agents report to the controller. A node reports on itself only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sllm.core.ids import NodeName
from sllm.core.node import NodeReport
from sllm.rpc import common_pb2, controller_pb2
from sllm.rpc.transport import Client, Handlers, Method


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterResponse:
    """`epoch` is the leader's; the agent refuses commands of a lower one. Heartbeats are due every `heartbeat_s`."""

    epoch: int
    heartbeat_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatRequest:
    """`report` is there when it changed since the last heartbeat that was answered; else `revision` says it did not."""

    name: NodeName
    incarnation: str
    revision: int
    report: NodeReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatResponse:
    """`resync`: the controller does not hold this incarnation and revision; send the whole report at once."""

    epoch: int
    resync: bool


class NodeService(Protocol):
    """`register` raises Conflict while another living agent has this name."""

    async def register(self, request: NodeReport) -> RegisterResponse: ...
    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse: ...


NAME = "sllm.rpc.NodeService"
_m = controller_pb2
REGISTER = Method("Register", NodeReport, common_pb2.NodeReport, RegisterResponse, _m.RegisterResponse)
HEARTBEAT = Method("Heartbeat", HeartbeatRequest, _m.HeartbeatRequest, HeartbeatResponse, _m.HeartbeatResponse)


def handlers(implementation: NodeService) -> Handlers:
    """Return the service for `transport.serve`."""
    return Handlers(NAME, (REGISTER, HEARTBEAT), implementation)


class NodeClient(Client):
    """Client of NodeService."""

    service = NAME

    async def register(self, request: NodeReport) -> RegisterResponse:
        return await self._unary(REGISTER, request)

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        return await self._unary(HEARTBEAT, request)
