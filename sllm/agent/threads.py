"""Runs blocking work beside the event loop, so that cancelling the waiter ends the work too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def run_cancellable(executor: Executor, work: Callable[[threading.Event], T]) -> T:
    """Run `work(cancel)` in the executor. When this call is cancelled the event is set, and the call ends only when
    the work has: nothing of it goes on in the background."""
    cancel = threading.Event()
    future = asyncio.get_running_loop().run_in_executor(executor, work, cancel)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel.set()
        future.add_done_callback(_seen)
        await asyncio.wait([future])
        raise


def _seen(future: asyncio.Future[T]) -> None:
    """Nobody asks how cancelled work ended."""
    if not future.cancelled():
        future.exception()
