"""An engine host as its agent deals with it: follow what it says, stop it, make it stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress

from sllm.agent.warm.base import HostProcess
from sllm.errors import SllmError, Unavailable
from sllm.rpc.engine import AttachRequest, EngineClient, HostStatus, StopRequest

log = logging.getLogger(__name__)

REATTACH_S = (0.1, 2.0)  # first and longest wait before attaching again
STOP_MARGIN_S = 5.0  # beyond its time to drain, before a host that was told to stop is made to
TERMINATE_S = 3.0


class EngineHost:
    """Takes over `client`. While somebody iterates `statuses`, the host knows that its agent is there."""

    def __init__(self, process: HostProcess, client: EngineClient, nonce: str) -> None:
        self.process = process
        self.client = client
        self._nonce = nonce

    async def statuses(self) -> AsyncGenerator[HostStatus, None]:
        """Yield what the host says of itself, attaching again when the stream breaks. Raises StaleGeneration."""
        delay_s = REATTACH_S[0]
        while True:
            with suppress(Unavailable):
                async with aclosing(self.client.attach(AttachRequest(nonce=self._nonce))) as stream:
                    async for status in stream:
                        delay_s = REATTACH_S[0]
                        yield status
            await asyncio.sleep(delay_s)
            delay_s = min(REATTACH_S[1], delay_s * 2)

    async def stop(self, drain_s: float) -> None:
        """Let it finish its requests for up to `drain_s`, then end it by whatever it takes."""
        if await self._within(drain_s + STOP_MARGIN_S, self._ask_to_stop(drain_s)):
            return
        log.warning("engine host %d did not stop, it is made to", self.process.pid)
        self.process.signal(signal.SIGTERM)
        if not await self._within(TERMINATE_S, self.process.ended()):
            self.process.signal(signal.SIGKILL)

    async def kill(self) -> None:
        """End it now, and return when it is gone."""
        self.process.signal(signal.SIGKILL)
        await self.process.ended()

    async def _ask_to_stop(self, drain_s: float) -> None:
        try:
            await self.client.stop(StopRequest(drain_s=drain_s))
        except SllmError as error:
            log.warning("engine host %d does not take the order to stop: %s", self.process.pid, error)
        await self.process.ended()

    async def _within(self, seconds: float, end: Awaitable[object]) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await end
        except TimeoutError:
            return False
        return True
