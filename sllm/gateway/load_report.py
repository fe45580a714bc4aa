"""Tells the controller what runs and waits here: every second, and soon after a request was placed, so that it can be
listed and moved. Without these reports nothing scales to zero."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from sllm.errors import SllmError
from sllm.gateway.open_requests import OpenRequests
from sllm.rpc.control import Empty
from sllm.rpc.routes import ReportLoadRequest

log = logging.getLogger(__name__)

EVERY_S = 1.0
SOONEST_S = 0.25  # after the last one


class LoadSink(Protocol):
    async def report_load(self, request: ReportLoadRequest) -> Empty: ...


async def report_load(
    controller: LoadSink,
    requests: OpenRequests,
    *,
    gateway: str,
    incarnation: str,
    every_s: float = EVERY_S,
    soonest_s: float = SOONEST_S,
) -> None:
    """Report until cancelled. What a lost report counted is in the next one."""
    failing = False
    while True:
        finished = requests.take_finished()
        try:
            await controller.report_load(
                ReportLoadRequest(gateway=gateway, incarnation=incarnation, requests=requests.rows(), finished=finished)
            )
            failing = False
        except SllmError as error:
            requests.give_back_finished(finished)
            if not failing:
                log.warning("the controller does not take load reports: %s", error.message)
            failing = True
        await asyncio.sleep(soonest_s)
        await requests.news(within_s=every_s - soonest_s)
