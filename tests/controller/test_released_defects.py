"""What the released scheduler of the paper's authors gets wrong, and this controller does not: a test for each defect.

The numbers are those of a list that has others too; 6 is in `tests/agent/test_released_defects.py`.
"""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

import sllm
from sllm.core.node import NodeState

PACKAGES = ("controller", "scheduler")


async def test_defect_5_a_warm_request_sleeps_for_a_second_in_a_serial_loop(bench, monkeypatch):
    """Here: 32 warm requests are answered by events, all at once, and nobody sleeps. The clock stands still."""
    await bench.add("a")
    await bench.done(await bench.deploy(min_replicas=1, target_concurrency=8))
    slept, real = [], asyncio.sleep

    async def noted(delay, *rest):
        if delay:
            slept.append(delay)
        return await real(0, *rest)

    monkeypatch.setattr(asyncio, "sleep", noted)
    before = bench.now
    rows = await asyncio.gather(*(bench.gateway.acquire() for _ in range(32)))
    assert {row.replica for row in rows} == {replica.spec.id for replica in bench.replicas()}
    assert (slept, bench.now) == ([], before)


@pytest.mark.parametrize("package", PACKAGES)
def test_defect_5_the_control_path_polls_with_sleeps(package):
    """Here: no module that decides or commands calls `sleep` at all."""
    found = []
    for file in sorted((Path(sllm.__file__).parent / package).rglob("*.py")):
        calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        names = (getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls)
        found += [file.name for name in names if name == "sleep"]
    assert found == []


async def test_defect_9_a_node_that_joins_late_is_invisible(bench):
    """Here: a request that waits for want of a device is served by one that joins meanwhile."""
    early = await bench.add("early")
    await bench.done(await bench.deploy("other", min_replicas=1))
    await bench.deploy()
    waiting = asyncio.create_task(bench.gateway.acquire())
    await bench.quiet()
    assert not waiting.done()
    late = await bench.add("late")
    row = await waiting
    assert [len(agent.starts()) for agent in (early, late)] == [1, 1]
    assert row.replica in late.replicas


async def test_defect_9_a_node_that_dies_is_never_noticed(bench):
    """Here: its silence is noticed, and who is held is served elsewhere."""
    dying = await bench.add("a")
    await bench.deploy()
    row = await bench.gateway.acquire()
    other = await bench.add("b")
    await dying.stop()
    bench.gateway.rows.clear()  # its request has lost its replica, and asks for another one
    await bench.advance(20.0)
    assert (await bench.node("a")).state is NodeState.DEAD
    assert (await bench.gateway.acquire()).replica in other.replicas
    assert row.replica not in {replica.spec.id for replica in bench.replicas()}


async def test_defect_9_all_state_is_lost_with_the_head_process(bench, store):
    """Here: a controller that begins anew on the same store knows what is wanted, and finds what runs."""
    agent = await bench.add("a", devices=2)
    await bench.done(await bench.deploy(min_replicas=1))
    (running,) = bench.replicas()
    await bench.restart(store)
    await agent.join(bench.controller.address)
    await bench.quiet()
    assert [replica.spec for replica in bench.replicas()] == [running.spec]
    assert len(agent.starts()) == 1
    assert (await bench.gateway.acquire()).replica == running.spec.id
