"""The short measurement of a node's disk, on real files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.agent import probing
from sllm.core.residency import Tier
from sllm.loader.format import MAX_CHUNK_BYTES

MakeNode = Callable[..., Any]
MIB = 1 << 20


def probe(node: Any) -> Any:
    return node.local.report("127.0.0.1:1").probe


async def test_a_node_measures_its_disk_as_soon_as_it_holds_a_checkpoint(make_node: MakeNode, model: Path) -> None:
    node = make_node()
    measuring = asyncio.create_task(node.local.measure_disk())
    await asyncio.sleep(0)
    assert probe(node) is None, "there is nothing to read"
    digest = await node.add(model)
    await measuring
    found = probe(node)
    stored = node.local.store.with_digest(digest)
    assert (found.number, found.digest, found.tier) == (0, digest, Tier.SSD)
    assert found.size_bytes == stored.manifest.partitions[0].size_bytes, "it is so small that all of it was read"
    assert found.read_s > 0
    assert node.local.report("127.0.0.1:1").loads == (), "it is no load"


async def test_it_reads_no_more_than_a_little(
    make_node: MakeNode, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node()
    digest = await node.add(make_model("large", 16 * MIB))
    stored = node.local.store.with_digest(digest)
    monkeypatch.setattr(probing, "MOST_BYTES", 4 * MIB)
    monkeypatch.setattr(probing, "RING_BYTES", MAX_CHUNK_BYTES)
    found = probing.measured(node.local.store.folder(stored), stored, threads=2)
    assert found is not None
    assert 4 * MIB <= found.size_bytes < 16 * MIB


async def test_it_takes_no_longer_than_a_moment(
    make_node: MakeNode, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node()
    stored = node.local.store.with_digest(await node.add(model))
    monkeypatch.setattr(probing, "MOST_S", -1.0)  # its time is over before it begins
    assert probing.measured(node.local.store.folder(stored), stored, threads=2) is None


async def test_a_disk_that_cannot_be_read_is_not_measured_and_harms_nothing(
    make_node: MakeNode, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = make_node()
    stored = node.local.store.with_digest(await node.add(model))
    (node.local.store.folder(stored) / "partition-000.bin").unlink()
    await node.local.measure_disk()
    assert probe(node) is None
    assert "the disk is not measured" in caplog.text
