"""Registration and heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sllm.agent import heartbeat as heartbeats
from sllm.agent.changes import Changes
from sllm.agent.heartbeat import Heartbeat
from sllm.core.ids import NodeName
from sllm.core.node import NodeReport
from sllm.errors import Conflict, SllmError, Unavailable


class Node:
    def __init__(self, controller: Any, **options: Any) -> None:
        self.changes = Changes()
        self.epochs: list[int] = []
        self.ticks = 0
        self.heartbeat = Heartbeat(controller, self.changes, self.report, self.epochs.append, self.tick, **options)

    def report(self) -> NodeReport:
        return NodeReport(
            name=NodeName("node-1"),
            incarnation="i",
            revision=self.changes.revision,
            address="127.0.0.1:1",
            version="0",
            engine="fake",
            warm=False,
        )

    def tick(self) -> None:
        self.ticks += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.heartbeat.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "RETRY_S", (0.001, 0.01))


async def until(controller: Any, true: Callable[[], Any]) -> None:
    await controller.until(lambda _: true(), within_s=10.0)


async def test_registers_and_hears_the_epoch(controller: Any) -> None:
    controller.epoch = 7
    node = Node(controller)
    async with node.running():
        await until(controller, lambda: controller.registrations)
        await until(controller, lambda: node.epochs)
    assert node.epochs[0] == 7


async def test_a_change_is_sent_at_once_and_only_changes_carry_a_report(controller: Any) -> None:
    controller.heartbeat_s = 3600.0
    node = Node(controller)
    async with node.running():
        await until(controller, lambda: controller.registrations)
        await asyncio.sleep(0)
        node.changes.notify()
        node.changes.notify()
        await until(controller, lambda: controller.heartbeats)
    assert [beat.report.revision for beat in controller.heartbeats] == [2]


async def test_without_changes_it_beats_in_time_without_a_report(controller: Any) -> None:
    controller.heartbeat_s = 0.01
    node = Node(controller)
    async with node.running():
        await until(controller, lambda: len(controller.heartbeats) >= 3)
    assert all(beat.report is None and beat.revision == 0 for beat in controller.heartbeats)
    assert node.ticks >= 3


async def test_a_resync_is_answered_at_once_with_everything(controller: Any) -> None:
    controller.heartbeat_s = 0.01
    controller.resync = True
    node = Node(controller)
    async with node.running():
        await until(controller, lambda: len(controller.heartbeats) >= 2)
    assert [beat.report is None for beat in controller.heartbeats[:2]] == [True, False]


async def test_tries_again_while_the_controller_is_away(controller: Any) -> None:
    controller.refusals = [Unavailable("not there"), SllmError("broken"), Unavailable("not there")]
    node = Node(controller)
    async with node.running():
        await until(controller, lambda: controller.registrations)


async def test_registers_again_when_a_heartbeat_is_not_answered(controller: Any) -> None:
    controller.heartbeat_s = 0.01
    node = Node(controller)
    async with node.running():
        await until(controller, lambda: controller.heartbeats)
        controller.refusals = []
        original, failed = controller.heartbeat, []

        async def fail_once(request: Any) -> Any:
            if not failed:
                failed.append(request)
                raise Unavailable("gone")
            return await original(request)

        controller.heartbeat = fail_once
        await until(controller, lambda: controller.registrations == 2)


async def test_outwaits_its_killed_predecessor_but_not_a_living_namesake(controller: Any) -> None:
    controller.refusals = [Conflict("node-1 is alive elsewhere")] * 3
    async with Node(controller).running():
        await until(controller, lambda: controller.registrations)
    controller.refusals = [Conflict("node-1 is alive elsewhere")] * 1000
    with pytest.raises(Conflict, match="alive elsewhere"):
        await Node(controller, conflict_patience_s=0.02).heartbeat.run()
