"""The loading queue: who reads, who waits, who shares."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from sllm.errors import InvalidCheckpoint


async def test_progress_goes_from_nothing_to_all(
    make_node: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    node = make_node()
    digest = await node.add(make_model("large", 128 << 20))
    seen: list[float] = []
    async with node.local.weights.pinned(node.local.store.with_digest(digest), seen.append) as region:
        assert region.ready
        assert region.pins == 1
    assert seen[0] == 0.0
    assert seen == sorted(seen)
    assert region.pins == 0


async def test_one_of_two_who_share_a_read_may_leave(
    make_node: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    node = make_node()
    manifest = node.local.store.with_digest(await node.add(make_model("large", 64 << 20)))
    reading = asyncio.Event()

    async def hold() -> int:
        async with node.local.weights.pinned(manifest, lambda _: reading.set()) as region:
            return int(region.pins)

    first, second = asyncio.create_task(hold()), asyncio.create_task(hold())
    await reading.wait()
    first.cancel()
    assert await second >= 1
    with pytest.raises(asyncio.CancelledError):
        await first
    held = node.local.weights.pool.find(manifest.checkpoint.digest)
    assert (held.ready, held.pins) == (True, 0)


async def test_a_read_that_all_have_left_is_called_off_and_can_be_begun_again(
    make_node: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    node = make_node()
    manifest = node.local.store.with_digest(await node.add(make_model("large", 96 << 20)))
    reading = asyncio.Event()

    async def hold() -> None:
        async with node.local.weights.pinned(manifest, lambda _: reading.set()):
            pass

    task = asyncio.create_task(hold())
    await reading.wait()
    task.cancel()
    await asyncio.wait([task])
    assert node.local.weights.pool.regions() == ()
    await hold()
    assert node.local.weights.pool.regions()[0].ready


async def test_what_cannot_be_read_is_an_error_for_all_who_wait(make_node: Callable[..., Any], model: Path) -> None:
    node = make_node()
    manifest = node.local.store.with_digest(await node.add(model))
    (node.local.store.folder(manifest) / "model.safetensors").write_bytes(b"short")

    async def hold() -> None:
        async with node.local.weights.pinned(manifest, lambda _: None):
            pass

    outcomes = await asyncio.gather(hold(), hold(), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [InvalidCheckpoint] * 2
    assert node.local.weights.pool.regions() == ()


async def test_a_full_pool_gives_up_what_is_not_used(
    make_node: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    node = make_node(dram_bytes=10 << 20)
    store, weights = node.local.store, node.local.weights
    manifests = []
    for number in range(3):
        digest = await node.add(make_model(f"m{number}", (4 << 20) + number * 64), f"m{number}")
        manifests.append(store.with_digest(digest))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(weights.pinned(manifests[0], lambda _: None))
        for manifest in manifests[1:]:
            async with weights.pinned(manifest, lambda _: None):
                pass
        held = {region.digest for region in weights.pool.regions()}
    assert held == {manifests[0].checkpoint.digest, manifests[2].checkpoint.digest}
