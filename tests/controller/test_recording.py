"""Every plan of a controller is recorded, if a file is named, with its snapshot, and is made again from that."""

from __future__ import annotations

import pytest

from sllm.controller.recording import Recorder
from sllm.controller.store.memory import MemoryStore
from sllm.errors import InvalidConfiguration
from sllm.sim.policies import ours
from sllm.sim.replay import differences, read_record


async def test_what_was_decided_is_decided_again_from_the_record(tools, tmp_path):
    path = tmp_path / "record.jsonl"
    async with tools.opened(MemoryStore(), record=path) as bench:
        for name in ("a", "b"):
            await bench.add(name)
        await bench.done(await bench.deploy(min_replicas=1, keep_alive_s=5.0))
        await bench.deploy("other", min_replicas=2, max_replicas=2, keep_alive_s=5.0)
        await bench.scale(min_replicas=0, max_replicas=1)
        await bench.advance(12)
        await bench.until(lambda: bench.ready("other") == 2)
    records = list(read_record(path))
    started = [action for record in records for action in record.plan["actions"] if action["is"] == "StartReplica"]
    assert {action["deployment"] for action in started} == {"app", "other"}
    assert any(record.plan["reasons"] for record in records), "something had to wait"
    assert list(differences(path, ours)) == []


async def test_a_controller_goes_on_with_the_record_of_the_one_before(tools, tmp_path):
    path, store = tmp_path / "record.jsonl", MemoryStore()
    for _ in range(2):
        async with tools.opened(store, record=path) as bench:
            await bench.settle()
    read = list(read_record(path))
    assert len(read) >= 2
    assert [record.line for record in read] == list(range(1, len(read) + 1))


def test_without_a_file_nothing_is_recorded_and_one_that_cannot_be_written_is_an_error(tmp_path):
    with Recorder(None):
        pass
    with pytest.raises(InvalidConfiguration, match="cannot record"):
        Recorder(tmp_path / "none" / "record.jsonl")
