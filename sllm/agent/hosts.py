"""An engine host as its agent deals with it: follow what it says, stop it, make it stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from time import monotonic

from sllm.agent.warm.base import HostProcess
from sllm.errors import EngineFailed, SllmError, Unavailable
from sllm.rpc.engine import AttachRequest, EngineClient, HostStatus, StopRequest

log = logging.getLogger(__name__)

REATTACH_S = (0.1, 2.0)  # first and longest wait before attaching again
UNRESPONSIVE_S = 10.0  # without a status once the stream is broken, before a host is given up
ATTACH_S = 5.0  # for one attempt to attach, so that several fit into the time above
STOP_MARGIN_S = 5.0  # beyond its time to drain, before a host that was told to stop is made to
TERMINATE_S = 3.0


class EngineHost:
    """Takes over `client`. While somebody iterates `statuses`, the host knows that its agent is there."""

    def __init__(self, process: HostProcess, client: EngineClient, nonce: str) -> None:
        self.process = process
        self.client = client
        self._nonce = nonce

    async def statuses(self) -> AsyncGenerator[HostStatus, None]:
        """Yield what the host says of itself, attaching again when the stream breaks.

        Raises StaleGeneration, and EngineFailed for a host that once spoke and does not answer for UNRESPONSIVE_S.
        """
        silence = _Silence()
        while True:
            with suppress(Unavailable):
                async with aclosing(self._attached(silence.attempt())) as stream:
                    async for status in stream:
                        silence.spoken()
                        yield status
            await asyncio.sleep(silence.pause())

    async def _attached(self, limit_s: float | None) -> AsyncGenerator[HostStatus, None]:
        """Yield the statuses of one stream. Raises Unavailable also if there is none within `limit_s`."""
        async with aclosing(self.client.attach(AttachRequest(nonce=self._nonce))) as stream:
            try:
                async with asyncio.timeout(limit_s):
                    first = await anext(stream, None)
            except TimeoutError as error:
                raise Unavailable(f"{self.client.peer} did not answer within {limit_s} s") from error
            if first is not None:
                yield first
            async for status in stream:
                yield status

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


class _Silence:
    """How much longer a host may be silent, and when it is asked again.

    Before its first word there is no limit here: the limit of a start, or of finding it again, holds. Time counts by
    attempt, and none for more than ATTACH_S: a pause of this agent is not the host's.
    """

    def __init__(self) -> None:
        self._left_s: float | None = None
        self._delay_s = REATTACH_S[0]
        self._asked_at: float | None = None

    def attempt(self) -> float | None:
        """Begin to attach, and return for how long at most."""
        self._asked_at = monotonic()
        return self._limit_s

    def spoken(self) -> None:
        """The host has spoken."""
        self._left_s = UNRESPONSIVE_S
        self._delay_s = REATTACH_S[0]
        self._asked_at = None

    def pause(self) -> float:
        """The stream is broken, or there was none: return the time until the next attempt. Raises EngineFailed."""
        delay_s, self._delay_s = self._delay_s, min(REATTACH_S[1], self._delay_s * 2)
        if self._left_s is None:
            return delay_s
        self._left_s -= self._asked_s()
        if self._left_s <= 0:
            raise EngineFailed(
                "the engine host does not answer",
                hint="see the replica's log; it was stopped, or its machine is overloaded",
            )
        delay_s = min(delay_s, self._left_s)
        self._left_s -= delay_s
        return delay_s

    @property
    def _limit_s(self) -> float | None:
        return None if self._left_s is None else min(ATTACH_S, self._left_s)

    def _asked_s(self) -> float:
        """Return the time that the last attempt took, if it was in vain."""
        return 0.0 if self._asked_at is None else min(ATTACH_S, monotonic() - self._asked_at)
