from __future__ import annotations

import pytest

from sllm.errors import ChunkCorrupt, Conflict, NotFound
from sllm.rpc.agents import VerifyCheckpointCommand
from sllm.rpc.control import RemoveCheckpointRequest, VerifyCheckpointRequest


async def verify(bench, name="m", **fields):
    return await bench.control.verify_checkpoint(VerifyCheckpointRequest(request_id=bench._next(), name=name, **fields))


async def test_every_copy_is_read_as_thoroughly_as_asked(bench):
    agents = [await bench.add(name) for name in "ab"]
    ended = await bench.done(await verify(bench, deep=True))
    assert (ended.state, ended.kind, ended.target) == ("done", "checkpoint.verify", "m")
    for agent in agents:
        (command,) = agent.commands
        assert isinstance(command, VerifyCheckpointCommand)
        assert (command.name, command.deep) == ("m", True)


async def test_one_node_can_be_asked_alone(bench):
    agents = [await bench.add(name) for name in "ab"]
    assert (await bench.done(await verify(bench, nodes=("b",)))).state == "done"
    assert [len(agent.commands) for agent in agents] == [0, 1]


async def test_a_damaged_copy_fails_it_by_its_own_reason(bench):
    await bench.add("a")
    damaged = await bench.add("b")
    damaged.damage = ChunkCorrupt("chunk 3 of partition-000.bin is not what was written")
    ended = await bench.done(await verify(bench))
    assert (ended.state, ended.error_reason) == ("failed", "CHUNK_CORRUPT")
    assert ended.error == "node 'b': chunk 3 of partition-000.bin is not what was written"
    assert "add" in ended.hint


async def test_what_is_not_there_cannot_be_verified(bench):
    await bench.add("a")
    await bench.add("b", checkpoints=())
    for fields in ({"name": "nope"}, {"nodes": ("b",)}, {"nodes": ("zz",)}):
        with pytest.raises(NotFound):
            await verify(bench, **fields)


async def test_nothing_is_removed_while_it_is_verified(bench):
    agent = await bench.add("a")
    agent.verify_goes_on.clear()
    operation = await verify(bench)
    await bench.until(lambda: agent.commands)
    with pytest.raises(Conflict, match="verify"):
        await bench.control.remove_checkpoint(RemoveCheckpointRequest(request_id=bench._next(), name="m"))
    joined = await verify(bench)
    assert joined.id == operation.id
    with pytest.raises(Conflict):
        await verify(bench, deep=True)
    agent.verify_goes_on.set()
    assert (await bench.done(operation)).state == "done"
