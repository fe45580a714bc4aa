"""Checkpoints coming and going."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sllm.core.ids import CheckpointName, ReplicaId
from sllm.core.residency import ResidencyState, Tier
from sllm.errors import Conflict, InvalidArgument, InvalidCheckpoint, NotFound, UnsupportedCheckpoint

DEMO = CheckpointName("demo")


async def test_adding_reports_progress_and_the_checkpoint(
    make_node: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    node = make_node()
    source = str(make_model("large", 64 << 20))
    seen = [progress async for progress in node.local.checkpoints.add(DEMO, source)]
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert seen[-1].done_bytes == seen[-1].total_bytes > 64 << 20
    assert seen[-1].checkpoint.name == DEMO
    assert all(p.checkpoint is None for p in seen[:-1])


async def test_the_same_again_joins_the_work_under_way(make_node: Callable[..., Any], model: Path) -> None:
    node = make_node()
    both = await asyncio.gather(node.add(model), node.add(model))
    assert both[0] == both[1] == await node.add(model)
    assert len(node.local.store.entries()) == 1


async def test_a_name_that_is_being_added_is_taken(
    make_node: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    node = make_node()
    adding = asyncio.create_task(node.add(make_model("large", 64 << 20)))
    await asyncio.sleep(0)
    with pytest.raises(Conflict, match="is being added from"):
        await node.add(make_model("other"))
    with pytest.raises(Conflict, match="is being added"):
        await node.local.checkpoints.remove(DEMO)
    await adding


async def test_adding_goes_on_when_nobody_watches(
    make_node: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    node = make_node()
    source = str(make_model("large", 64 << 20))
    async for _ in node.local.checkpoints.add(DEMO, source):
        break
    await node.until(node.local.store.entries)


async def test_stopping_calls_off_what_is_being_added(
    make_node: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    node = make_node()
    adding = asyncio.create_task(node.add(make_model("large", 96 << 20)))
    await asyncio.sleep(0)
    await node.local.checkpoints.close()
    with pytest.raises(asyncio.CancelledError):
        await adding
    assert list(node.local.store.root.iterdir()) == []


async def test_an_architecture_that_the_engine_lacks_is_refused_before_copying(
    make_node: Callable[..., Any], model: Path
) -> None:
    node = make_node()
    node.warm.about = replace(node.warm.about, architectures=("QwenForCausalLM",))
    with pytest.raises(UnsupportedCheckpoint, match="LlamaForCausalLM"):
        await node.add(model)
    node.warm.about = None  # it could not say: a start will tell
    await node.add(model)


@pytest.mark.parametrize(
    ("source", "error"), [("/nowhere", NotFound), ("relative", InvalidArgument), ("/proc/1/mem", InvalidArgument)]
)
async def test_a_wrong_source_is_refused_and_the_name_stays_free(
    make_node: Callable[..., Any], model: Path, source: str, error: type[Exception]
) -> None:
    node = make_node()
    with pytest.raises(error):
        await node.add(Path(source))
    await node.add(model)


async def test_a_wrong_checkpoint_is_refused_and_leaves_nothing(make_node: Callable[..., Any], model: Path) -> None:
    node = make_node()
    (model / "model.safetensors").write_bytes(b"PK")
    with pytest.raises(InvalidCheckpoint):
        await node.add(model)
    assert list(node.local.store.root.iterdir()) == []


async def test_a_name_must_be_a_name(make_node: Callable[..., Any], model: Path) -> None:
    with pytest.raises(InvalidArgument, match="not a checkpoint name"):
        await make_node().add(model, "../../etc")


async def test_what_a_replica_uses_is_not_removed(
    make_node: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    node = make_node()
    spec = make_spec(await node.add(model))
    node.local.replicas.start(spec)
    with pytest.raises(Conflict, match="used by replica rep-000000000001"):
        await node.local.checkpoints.remove(DEMO)
    node.local.replicas.stop(spec.id, 1, 0.0)
    await node.until(lambda: node.state() == "gone")
    await node.local.checkpoints.remove(DEMO)
    with pytest.raises(NotFound):
        await node.local.checkpoints.remove(DEMO)
    await node.until(lambda: node.local.weights.in_memory == ())


async def test_memory_keeps_a_content_that_has_another_name(make_node: Callable[..., Any], model: Path) -> None:
    node = make_node()
    digest = await node.add(model)
    assert await node.add(model, "twin") == digest
    node.local.weights.prefetch(node.local.store.with_digest(digest))
    await node.until(lambda: [held.ready for held in node.local.weights.in_memory] == [True])
    await node.local.checkpoints.remove(DEMO)
    assert [held.digest for held in node.local.weights.in_memory] == [digest]
    await node.local.checkpoints.remove(CheckpointName("twin"))
    await node.until(lambda: node.local.weights.in_memory == ())


async def test_a_start_finds_nothing_of_what_is_being_removed(
    make_node: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    node = make_node()
    spec = make_spec(await node.add(model))
    removing = asyncio.create_task(node.local.checkpoints.remove(DEMO))
    await asyncio.sleep(0)
    with pytest.raises(NotFound):
        node.local.replicas.start(spec)
    with pytest.raises(Conflict, match="being removed"):
        await node.add(model)
    await removing
    assert await node.add(model) == spec.digest


async def test_a_copy_that_a_start_finds_damaged_is_put_in_quarantine_until_it_is_added_again(
    make_node: Callable[..., Any], make_spec: Callable[..., Any], model: Path
) -> None:
    node = make_node()
    spec = make_spec(await node.add(model))
    manifest = node.local.store.with_digest(spec.digest)
    (node.local.store.folder(manifest) / "partition-000.bin").write_bytes(b"short")
    node.local.replicas.start(spec)
    await node.until(node.local.store.damaged)
    node.local.replicas.stop(spec.id, 1, 0.0)
    await node.until(lambda: node.state() == "gone")
    report = node.local.report("127.0.0.1:1")
    assert [(r.tier, r.state) for r in report.residencies] == [(Tier.SSD, ResidencyState.QUARANTINED)]
    with pytest.raises(InvalidCheckpoint, match="damaged"):
        node.local.replicas.start(make_spec(spec.digest, id=ReplicaId("rep-2")))
    assert await node.add(model) == spec.digest
    assert [r.state for r in node.local.report("").residencies] == [ResidencyState.READY]
    node.local.replicas.start(make_spec(spec.digest, id=ReplicaId("rep-2")))
    await node.until_host()
