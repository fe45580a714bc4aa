"""Verifies a checkpoint of this node for somebody who watches; when he goes away, so does the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from sllm.agent.changes import Changes
from sllm.agent.weights import Weights
from sllm.core.ids import CheckpointName
from sllm.loader.store import SsdStore
from sllm.rpc.agents import AddProgress


async def verify(
    store: SsdStore, weights: Weights, name: CheckpointName, *, deep: bool
) -> AsyncGenerator[AddProgress, None]:
    """Yield progress; the last has the checkpoint. What is found damaged is used no more.

    Raises NotFound, and the InvalidCheckpoint that says what is wrong.
    """
    stored = store.named(name)
    latest = AddProgress(done_bytes=0, total_bytes=stored.manifest.stored_bytes)
    changes = Changes()

    def show(done_bytes: int, total_bytes: int) -> None:
        nonlocal latest
        latest = AddProgress(done_bytes=done_bytes, total_bytes=total_bytes)
        changes.notify()

    work = asyncio.create_task(weights.verify(stored, show, deep=deep))
    work.add_done_callback(lambda _: changes.notify())
    try:
        while not work.done():
            seen = changes.revision
            yield latest
            await changes.wait_beyond(seen)
        work.result()
    finally:
        work.cancel()
    total = latest.total_bytes
    yield AddProgress(done_bytes=total, total_bytes=total, checkpoint=stored.checkpoint)
