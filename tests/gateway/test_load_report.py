"""Load reports: what ended is counted once, even if a report is lost."""

import asyncio

from sllm.errors import Unavailable
from sllm.gateway.load_report import report_load
from sllm.gateway.open_requests import OpenRequests
from sllm.rpc.control import Empty
from sllm.rpc.routes import ReportLoadRequest


class Controller:
    def __init__(self, lost: int) -> None:
        self.lost = lost
        self.reports: asyncio.Queue[ReportLoadRequest] = asyncio.Queue()

    async def report_load(self, request: ReportLoadRequest) -> Empty:
        self.lost -= 1
        if self.lost >= 0:
            raise Unavailable("away")
        self.reports.put_nowait(request)
        return Empty()


async def test_what_a_lost_report_counted_is_in_the_next_one() -> None:
    requests, controller = OpenRequests(), Controller(lost=2)
    requests.give_back_finished({"m": 3})
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        reporting = tasks.create_task(
            report_load(controller, requests, gateway="g", incarnation="i", every_s=0.002, soonest_s=0.001)
        )
        first, second = await controller.reports.get(), await controller.reports.get()
        reporting.cancel()
    assert (first.gateway, first.incarnation, first.finished) == ("g", "i", {"m": 3})
    assert second.finished == {}


async def test_a_request_that_was_placed_is_reported_before_the_next_one_is_due() -> None:
    requests, controller = OpenRequests(), Controller(lost=0)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        reporting = tasks.create_task(
            report_load(controller, requests, gateway="g", incarnation="i", every_s=3600.0, soonest_s=0.001)
        )
        await controller.reports.get()
        requests.placed()
        await controller.reports.get()
        reporting.cancel()
