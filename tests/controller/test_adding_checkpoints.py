from __future__ import annotations

import asyncio

import pytest

from sllm.controller.store.memory import MemoryStore
from sllm.errors import CapacityExceeded, Conflict, InvalidArgument, InvalidCheckpoint, NotFound, Unavailable
from sllm.rpc.control import AddCheckpointRequest, Empty, RemoveCheckpointRequest, WatchOperationRequest


async def add(bench, name="new", source="/models/new", **fields):
    return await bench.control.add_checkpoint(
        AddCheckpointRequest(request_id=bench._next(), name=name, source=source, **fields)
    )


async def remove(bench, name="m", **fields):
    return await bench.control.remove_checkpoint(RemoveCheckpointRequest(request_id=bench._next(), name=name, **fields))


async def where(bench, name):
    rows = (await bench.control.list_checkpoints(Empty())).checkpoints
    return [copy.node for row in rows if row.checkpoint.name == name for copy in row.copies]


async def test_one_node_that_sees_the_source_gets_it_and_it_can_be_deployed_at_once(bench):
    await bench.add("a")
    await bench.add("b")
    bench.agents["b"].sources = {"/models/new": "digest-new"}
    operation = await bench.done(await add(bench))
    assert (operation.state, operation.kind, operation.target) == ("done", "checkpoint.add", "new")
    assert await where(bench, "new") == ["b"]
    assert (await bench.done(await bench.deploy(checkpoint="new"))).state == "done"


async def test_it_is_not_done_before_the_nodes_report_shows_it(bench):
    agent = await bench.add("a")
    agent.sources, agent.tell = {"/models/new": "digest-new"}, False
    operation = await add(bench)
    await bench.until(lambda: "report" in bench.controller.world.jobs.get(operation.id).operation.phase)
    await agent.beat()
    assert (await bench.done(operation)).state == "done"


async def test_progress_is_told(bench):
    agent = await bench.add("a")
    agent.sources = {"/models/new": "digest-new"}
    agent.add_goes_on.clear()
    operation = await add(bench)
    async for seen in bench.control.watch_operation(WatchOperationRequest(id=operation.id)):
        if seen.progress == 0.25:
            assert "a" in seen.phase
            agent.add_goes_on.set()
    assert (seen.state, seen.progress) == ("done", 1.0)


async def test_the_node_with_the_most_room_is_tried_first(bench):
    for name, free in (("a", 10), ("b", 30), ("c", 20)):
        agent = await bench.add(name)
        agent.free_bytes, agent.sources = free, {"/models/new": "digest-new"}
        agent.changed()
    await bench.quiet()
    await bench.done(await add(bench))
    assert await where(bench, "new") == ["b"]


async def test_the_last_error_is_the_answer_if_no_node_can(bench):
    await bench.add("a")
    bench.agents["a"].sources = {"/models/new": CapacityExceeded("needs 9 bytes, 1 is free")}
    operation = await bench.done(await add(bench))
    assert (operation.state, operation.error_reason) == ("failed", "CAPACITY_EXCEEDED")
    assert "needs 9 bytes" in operation.error


async def test_a_wrong_checkpoint_is_not_tried_on_another_node(bench):
    for name in "ab":
        (await bench.add(name)).sources = {"/models/new": InvalidCheckpoint("shard 2 is truncated", hint="copy again")}
    operation = await bench.done(await add(bench))
    assert (operation.error_reason, operation.hint) == ("INVALID_CHECKPOINT", "copy again")
    assert sum(len(agent.commands) for agent in bench.agents.values()) == 1


async def test_all_nodes_get_it(bench):
    for name in "ab":
        (await bench.add(name)).sources = {"/models/new": "digest-new"}
    assert (await bench.done(await add(bench, all_nodes=True))).state == "done"
    assert await where(bench, "new") == ["a", "b"]


async def test_the_node_that_failed_is_named_and_the_others_have_it(bench):
    for name in "ab":
        (await bench.add(name)).sources = {"/models/new": "digest-new"}
    bench.agents["a"].sources = {}
    operation = await bench.done(await add(bench, nodes=("a", "b")))
    assert (operation.state, operation.error_reason) == ("failed", "NOT_FOUND")
    assert "node 'a'" in operation.error
    assert await where(bench, "new") == ["b"]


async def test_a_name_means_the_same_content_everywhere(bench):
    await bench.add("a")
    other = await bench.add("b", checkpoints=())
    other.sources = {"/models/m": "different"}
    operation = await bench.done(await add(bench, "m", "/models/m", nodes=("b",)))
    assert (operation.state, operation.error_reason) == ("failed", "CONFLICT")
    assert other.checkpoints == {}


async def test_nodes_that_see_different_content_conflict(bench):
    for name in "ab":
        (await bench.add(name)).sources = {"/models/new": f"digest-{name}"}
    operation = await bench.done(await add(bench, all_nodes=True))
    assert (operation.state, operation.error_reason) == ("failed", "CONFLICT")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"name": "no spaces"}, InvalidArgument),
        ({"name": "a/b"}, InvalidArgument),
        ({"source": ""}, InvalidArgument),
        ({"nodes": ("a",), "all_nodes": True}, InvalidArgument),
        ({"nodes": ("zz",)}, NotFound),
        ({"nodes": ("dead",)}, Unavailable),
    ],
)
async def test_what_cannot_be_is_refused_at_once(bench, fields, error):
    (await bench.add("dead")).silent = True
    await bench.advance(16)
    await bench.add("a")
    with pytest.raises(error):
        await add(bench, **fields)


async def test_without_nodes_nothing_can_be_added(bench):
    with pytest.raises(Unavailable, match="no node is ready"):
        await add(bench)


async def test_an_add_under_way_goes_on_after_a_restart_of_the_controller(tools):
    store = MemoryStore()
    async with tools.opened(store) as bench:
        agent = await bench.add("a")
        agent.sources = {"/models/new": "digest-new"}
        agent.add_goes_on.clear()
        operation = await add(bench)
        await bench.until(lambda: agent.commands)
        await bench.restart(store)
        agent.add_goes_on.set()
        await agent.join(bench.controller.address)
        assert (await bench.done(operation)).state == "done"
        assert {c.operation for c in agent.commands} == {operation.id}
        assert [c.epoch for c in agent.commands] == [1, 2]


async def test_removing_takes_it_from_all_nodes(bench):
    agents = [await bench.add(name) for name in "ab"]
    assert (await bench.done(await remove(bench))).state == "done"
    assert [agent.checkpoints for agent in agents] == [{}, {}]
    assert await where(bench, "m") == []


async def test_removing_from_one_node_leaves_the_others(bench):
    for name in "ab":
        await bench.add(name)
    await bench.deploy()
    assert (await bench.done(await remove(bench, nodes=("a",)))).state == "done"
    assert await where(bench, "m") == ["b"]


async def test_the_last_copy_of_what_is_deployed_stays(bench):
    for name in "ab":
        await bench.add(name)
    await bench.done(await bench.deploy(min_replicas=1))
    with pytest.raises(Conflict, match="app"):
        await remove(bench)
    (replica,) = bench.replicas()
    with pytest.raises(Conflict, match=replica.spec.id):
        await remove(bench, nodes=(replica.node,))
    await bench.done(await bench.delete())
    assert (await bench.done(await remove(bench))).state == "done"


async def test_removing_what_is_not_there_is_not_found(bench):
    await bench.add("a")
    await bench.add("b", checkpoints=())
    for fields in ({"name": "nope"}, {"nodes": ("b",)}, {"nodes": ("zz",)}):
        with pytest.raises(NotFound):
            await remove(bench, **fields)


async def test_a_node_that_dies_while_copying_ends_the_operation(bench):
    agent = await bench.add("a")
    agent.sources = {"/models/new": "digest-new"}
    agent.add_goes_on.clear()
    operation = await add(bench)
    await bench.until(lambda: agent.commands)
    await agent.stop()
    ended = await bench.done(operation)
    assert (ended.state, ended.error_reason) == ("failed", "UNAVAILABLE")


async def test_many_operations_are_kept_and_not_for_ever(bench, monkeypatch):
    monkeypatch.setattr("sllm.controller.jobs.KEPT_ENDED", 3)
    await bench.add("a")
    operations = [await bench.done(await bench.deploy(request_id=f"r{i}")) for i in range(6)]
    await asyncio.gather(*(bench.done(o) for o in operations[-3:]))
    with pytest.raises(NotFound):
        await bench.done(operations[0])
    stored, _ = await bench.controller.world.store.range("requests/")
    assert len(stored) <= 4
