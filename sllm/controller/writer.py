"""Writer: the only task that changes the world. Events from one queue, then one plan for all of them."""

from __future__ import annotations

import asyncio
import logging

from sllm.controller.events import Woken
from sllm.controller.handlers import Handlers
from sllm.controller.inbox import Envelope, Inbox
from sllm.controller.planning import advance
from sllm.controller.world import World
from sllm.errors import SllmError, Unavailable
from sllm.rpc.nodes import HeartbeatRequest

log = logging.getLogger(__name__)


class Writer:
    def __init__(self, world: World, inbox: Inbox) -> None:
        self._world = world
        self._inbox = inbox
        self._handlers = Handlers(world)
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Run until cancelled. An error of a plan, or of a commit (whoever asked for it is told), ends it: a
        supervisor starts us anew, from what is stored."""
        try:
            while True:
                if self._world.changed:
                    self._world.changed = False
                    self._arm(await advance(self._world))
                for envelope in await self._inbox.batch():
                    await self._handle(envelope)
                    if self._world.not_stored:
                        raise self._world.not_stored
        finally:
            self._disarm()
            self._inbox.close()
            for ticket in self._world.tickets.values():
                ticket.fail(Unavailable("the controller is stopping", hint="try again in a moment"))

    async def _handle(self, envelope: Envelope) -> None:
        reply = envelope.reply
        # Most events are heartbeats, and most of those say nothing new; their handler knows which do.
        self._world.changed |= not isinstance(envelope.event, HeartbeatRequest)
        try:
            answer = await self._handlers.handle(envelope.event)
        except Exception as error:
            if reply and not reply.done():
                reply.set_exception(error)
            elif isinstance(error, SllmError):
                log.warning("%s: %s", type(envelope.event).__name__, error)
            else:
                log.exception("cannot handle %s", type(envelope.event).__name__)
        else:
            if reply and not reply.done():
                reply.set_result(answer)

    def _arm(self, wake_at: float | None) -> None:
        self._disarm()
        if wake_at is not None:
            delay = max(0.0, wake_at - self._world.clock.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._inbox.post, Woken())

    def _disarm(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
