"""Checkpoints lie where they will be wanted before anybody asks, if the configuration says so."""

from __future__ import annotations

import pytest

from sllm.core.node import LoadReport
from sllm.core.residency import Tier
from sllm.errors import NotFound
from sllm.rpc.agents import AddCheckpointCommand, PrefetchCommand

SOURCE = "/models/m"


def commands(agent, kind):
    return [command for command in agent.commands if isinstance(command, kind)]


async def node(bench, tools, name, **fields):
    """Its disk is measured, and its copies say where they came from."""
    agent = await bench.add(name, **fields)
    load = LoadReport(number=1, digest="digest-m", size_bytes=1000, tier=Tier.SSD, queue_s=0.0, read_s=1.0)
    checkpoints = {c: tools.checkpoint_of(c, source=f"/models/{c}") for c in agent.checkpoints}
    await agent.says(loads=(load,), checkpoints=checkpoints, sources={SOURCE: "digest-m"})
    return agent


@pytest.fixture
async def prepared(store, tools):
    async with tools.opened(store, residency={"prefetch": True, "max_copies": 2}) as bench:
        yield bench


async def asked(bench, requests):
    """So many requests have come and gone, and the time between two decisions is over."""
    await bench.gateway.report(app=requests)
    await bench.advance(6.0)


async def test_what_is_popular_is_read_ahead_as_its_next_start_would_read_it(prepared, tools):
    agent = await node(prepared, tools, "a")
    await prepared.deploy(keep_alive_s=0.0, engine_args={"seed": "7"})
    await asked(prepared, 1)
    assert commands(agent, PrefetchCommand) == []
    await asked(prepared, 2)
    (command,) = commands(agent, PrefetchCommand)
    assert (command.spec.digest, command.spec.devices, command.spec.engine_args) == (
        "digest-m",
        ("a-d0",),
        {"seed": "7"},
    )
    assert command.epoch == prepared.controller.world.executor.epoch
    await asked(prepared, 9)
    assert len(commands(agent, PrefetchCommand)) == 1
    assert agent.starts() == []


async def test_a_decision_that_came_too_soon_is_made_when_it_is_due_though_nothing_more_happens(prepared, tools):
    agent = await node(prepared, tools, "a")
    await prepared.deploy(keep_alive_s=0.0)
    await prepared.quiet()
    await prepared.gateway.report(app=9)
    await prepared.quiet()
    world = prepared.controller.world
    assert commands(agent, PrefetchCommand) == []
    assert world.prepare_due
    prepared.now = world.prepare_at
    await prepared.until(lambda: commands(agent, PrefetchCommand))


async def test_what_is_asked_for_gets_a_second_copy_by_an_operation(prepared, tools):
    await node(prepared, tools, "a")
    empty = await node(prepared, tools, "b", checkpoints=())
    await prepared.deploy(keep_alive_s=0.0)
    await asked(prepared, 9)
    (command,) = commands(empty, AddCheckpointCommand)
    assert (command.name, command.source) == ("m", SOURCE)
    await prepared.until(lambda: prepared.controller.world.jobs.get(command.operation).operation.state == "done")
    assert list(empty.checkpoints) == ["m"]
    third = await node(prepared, tools, "c", checkpoints=())
    await asked(prepared, 99)
    assert commands(third, AddCheckpointCommand) == []


async def test_a_copy_that_cannot_be_made_is_not_tried_again_and_again(prepared, tools):
    await node(prepared, tools, "a")
    blind = await node(prepared, tools, "b", checkpoints=())
    blind.sources = {SOURCE: NotFound("it is not on this machine")}
    await prepared.deploy(keep_alive_s=0.0)
    for _ in range(4):
        await asked(prepared, 9)
    assert len(commands(blind, AddCheckpointCommand)) == 1


async def test_nothing_is_done_unasked_by_default(bench, tools):
    agents = [await node(bench, tools, "a"), await node(bench, tools, "b", checkpoints=())]
    await bench.deploy(keep_alive_s=0.0)
    await asked(bench, 50)
    assert [agent.commands for agent in agents] == [[], []]
