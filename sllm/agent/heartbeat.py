"""Tells the controller how this node is: registers, then heartbeats on time and at once on every change.

While the controller is away the node goes on as it is, and this tries again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from sllm.agent.changes import Changes
from sllm.core.node import NodeReport
from sllm.errors import Conflict, SllmError
from sllm.rpc.nodes import HeartbeatRequest, HeartbeatResponse, NodeService

log = logging.getLogger(__name__)

RETRY_S = (0.2, 2.0)  # first and longest wait before trying again
# An agent that was killed seems alive to the controller for some heartbeats; its successor has to outwait that.
CONFLICT_PATIENCE_S = 10.0


class Heartbeat:
    """`make_report` gives the node as it is now; `on_epoch` hears of the leader's epoch; `on_tick` is called
    before each report that is due by time.
    """

    def __init__(
        self,
        controller: NodeService,
        changes: Changes,
        make_report: Callable[[], NodeReport],
        on_epoch: Callable[[int], None],
        on_tick: Callable[[], None],
        *,
        conflict_patience_s: float = CONFLICT_PATIENCE_S,
    ) -> None:
        self._controller = controller
        self._changes = changes
        self._make_report = make_report
        self._on_epoch = on_epoch
        self._on_tick = on_tick
        self._conflict_patience_s = conflict_patience_s
        self._answered = -1  # the revision that the controller is known to hold
        self._every_s = 2.0

    async def run(self) -> None:
        """For ever. Raises Conflict if another living agent has this node's name."""
        while True:
            await self._register()
            await self._beat()

    async def _register(self) -> None:
        delay_s, began, complained = RETRY_S[0], time.monotonic(), False
        while True:
            try:
                report = self._make_report()
                response = await self._controller.register(report)
            except SllmError as error:
                if isinstance(error, Conflict) and time.monotonic() - began > self._conflict_patience_s:
                    raise
                if not complained:
                    log.warning("not registered yet: %s", error)
                complained = True
                await asyncio.sleep(delay_s)
                delay_s = min(RETRY_S[1], delay_s * 2)
                continue
            self._answered, self._every_s = report.revision, response.heartbeat_s
            self._on_epoch(response.epoch)
            log.info("registered with the controller, epoch %d", response.epoch)
            return

    async def _beat(self) -> None:
        """Heartbeat until the controller is lost or no longer knows this node."""
        while True:
            await self._change_or_time()
            try:
                response = await self._send()
            except SllmError as error:
                log.warning("the heartbeat was not answered: %s", error)
                return
            self._on_epoch(response.epoch)
            if response.resync:
                self._answered = -1  # the next one is sent at once, with all there is

    async def _change_or_time(self) -> None:
        try:
            async with asyncio.timeout(self._every_s):
                await self._changes.wait_beyond(self._answered)
        except TimeoutError:
            self._on_tick()

    async def _send(self) -> HeartbeatResponse:
        report = self._make_report()
        changed = report.revision != self._answered
        response = await self._controller.heartbeat(
            HeartbeatRequest(
                name=report.name,
                incarnation=report.incarnation,
                revision=report.revision,
                report=report if changed else None,
            )
        )
        self._answered = report.revision
        return response
