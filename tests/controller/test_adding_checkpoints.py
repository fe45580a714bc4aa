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
    stored, _ = await bench.controller.world.store.range("operations/")
    assert len(stored) <= 4


@pytest.fixture
async def shared(bench):
    """A bench with two nodes that see the same sources, and copy when told to."""
    for name in "ab":
        agent = await bench.add(name)
        agent.sources = {"/models/new": "digest-new", "/models/other": "digest-other"}
        agent.add_goes_on.clear()
    return bench


def go_on(bench):
    for agent in bench.agents.values():
        agent.add_goes_on.set()


async def test_a_name_is_given_to_one_copy_at_a_time(shared):
    first = await add(shared, nodes=("a",))
    with pytest.raises(Conflict, match=first.id):
        await add(shared, source="/models/other", nodes=("b",))
    with pytest.raises(NotFound):
        await remove(shared, "new")
    other = await add(shared, "other", "/models/other", nodes=("b",))
    go_on(shared)
    assert [(await shared.done(o)).state for o in (first, other)] == ["done", "done"]
    assert await where(shared, "new") == ["a"]


async def test_what_is_being_added_is_not_removed(shared):
    first = await add(shared, "m", "/models/m", nodes=("a",))
    shared.agents["a"].sources["/models/m"] = "digest-m"
    with pytest.raises(Conflict, match=first.id):
        await remove(shared)
    go_on(shared)


async def test_an_identical_add_joins_the_one_that_runs(shared):
    first = await add(shared)
    await shared.until(lambda: any(agent.commands for agent in shared.agents.values()))
    second = await add(shared)
    assert second.id == first.id
    go_on(shared)
    assert (await shared.done(second)).state == "done"
    assert sum(len(agent.commands) for agent in shared.agents.values()) == 1


async def restarted(bench, store):
    await bench.restart(store)
    for agent in bench.agents.values():
        await agent.join(bench.controller.address)


async def test_who_joined_an_add_is_remembered_after_a_restart(store, tools):
    async with tools.opened(store) as bench:
        agent = await bench.add("a")
        agent.sources = {"/models/new": "digest-new"}
        agent.add_goes_on.clear()
        first = await add(bench)
        request = AddCheckpointRequest(request_id="joins", name="new", source="/models/new")
        assert (await bench.control.add_checkpoint(request)).id == first.id
        agent.add_goes_on.set()
        await bench.done(first)
        await restarted(bench, store)
        again = await bench.control.add_checkpoint(request)
        assert (again.id, again.state) == (first.id, "done")


async def test_a_removal_that_was_done_before_a_restart_is_done(store, tools):
    async with tools.opened(store) as bench:
        agent = await bench.add("a")
        agent.tell = False  # it removes, but its report does not come before the controller ends
        operation = await remove(bench)
        await bench.until(lambda: agent.commands)
        await restarted(bench, store)
        agent.tell = True
        assert (await bench.done(operation)).state == "done"
        assert len(agent.commands) == 2


async def test_an_add_under_way_goes_on_after_a_restart(store, tools):
    async with tools.opened(store) as bench:
        agent = await bench.add("a")
        agent.sources = {"/models/new": "digest-new"}
        agent.add_goes_on.clear()
        operation = await add(bench)
        await bench.until(lambda: agent.commands)
        agent.add_goes_on.set()
        await restarted(bench, store)
        assert (await bench.done(operation)).state == "done"
