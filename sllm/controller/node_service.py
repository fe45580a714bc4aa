"""NodeService: what agents report."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, cast

from sllm.controller.events import Contested, Registered
from sllm.controller.inbox import Inbox
from sllm.controller.reports import name_taken
from sllm.core.node import NodeReport
from sllm.errors import SllmError, Unavailable
from sllm.rpc.agents import AgentClient, AgentReadLogsRequest
from sllm.rpc.nodes import HeartbeatRequest, HeartbeatResponse, RegisterResponse
from sllm.rpc.transport import Tls

PROBE_S = 2.0


class ControllerNodes:
    """Implements rpc.nodes.NodeService."""

    def __init__(self, inbox: Inbox, tls: Tls | None) -> None:
        self._inbox = inbox
        self._tls = tls

    async def register(self, request: NodeReport) -> RegisterResponse:
        """An agent that was killed and came back at another port must not wait until its old self counts as silent:
        the old address is asked."""
        answer = await self._inbox.submit(Registered(report=request))
        if isinstance(answer, Contested):
            if await self._answers(answer.address):
                raise name_taken(request, answer)
            answer = await self._inbox.submit(Registered(report=request, displaced=answer.incarnation))
            if isinstance(answer, Contested):  # a third one was faster
                raise name_taken(request, answer)
        return cast(RegisterResponse, answer)

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        return cast(HeartbeatResponse, await self._inbox.submit(request))

    async def _answers(self, address: str) -> bool:
        client = AgentClient(address, self._tls, peer="agent")
        try:
            async with asyncio.timeout(PROBE_S):
                stream = cast(Any, client.read_logs(AgentReadLogsRequest(replica="", lines=0)))
                async with aclosing(stream):
                    async for _ in stream:
                        break
            return True
        except (TimeoutError, Unavailable):
            return False
        except SllmError:
            return True  # it refuses, so it is there
        finally:
            await client.close()
