"""Asking the machine: what is news, and who waits."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

from sllm.agent.changes import Changes
from sllm.agent.devices.fake import FakeDevices
from sllm.agent.survey import Seen, Survey
from sllm.core.device import Device, DeviceState


class Machine:
    """`shut` holds back an answer until it is open."""

    def __init__(self) -> None:
        (self.device,) = FakeDevices().probe()
        self.changes = Changes()
        self.open = threading.Event()
        self.open.set()
        self.asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.questions = 0

    def ask(self) -> Seen:
        self.questions += 1
        self._loop.call_soon_threadsafe(self.asked.set)
        assert self.open.wait(10)
        return Seen(devices=(self.device,), ssd_capacity_bytes=self.questions)


async def answered(survey: Survey, device: Device) -> None:
    async with asyncio.timeout(10):
        survey.look()
        while survey.devices() != (device,):  # noqa: ASYNC110 - what is no news has no event
            await asyncio.sleep(0)


async def test_a_device_that_is_lost_is_news_and_a_measurement_is_not() -> None:
    machine = Machine()
    survey = Survey(machine.ask, machine.changes.notify)
    machine.device = replace(machine.device, memory_used_bytes=7, utilization_percent=50)
    await answered(survey, machine.device)
    assert machine.changes.revision == 0
    machine.device = replace(machine.device, state=DeviceState.LOST)
    await answered(survey, machine.device)
    assert machine.changes.revision == 1
    survey.close()


async def test_nobody_waits_for_a_driver_that_does_not_answer() -> None:
    machine = Machine()
    survey = Survey(machine.ask, machine.changes.notify)
    machine.open.clear()
    machine.asked.clear()
    survey.look()
    survey.look()  # one question at a time
    await machine.asked.wait()
    assert survey.devices() == (machine.device,)
    assert machine.questions == 2
    survey.close()
    machine.open.set()
