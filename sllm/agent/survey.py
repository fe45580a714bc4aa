"""What has to be asked of the machine: its devices and its disk. Drivers can take long to answer, or never do: they are
asked in a thread, and the last answer counts until there is a new one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from sllm.core.device import Device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One look at the machine."""

    devices: tuple[Device, ...]
    ssd_capacity_bytes: int


class Survey:
    """`look` asks; `on_change` is called when the answer is news, which a measurement that never rests is not."""

    def __init__(self, ask: Callable[[], Seen], on_change: Callable[[], None]) -> None:
        self._ask = ask
        self._on_change = on_change
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="survey")
        self._asking: asyncio.Future[Seen] | None = None
        self.seen = ask()  # nothing is served yet

    def devices(self) -> tuple[Device, ...]:
        return self.seen.devices

    def look(self) -> None:
        """Ask, unless an answer is being waited for."""
        if self._asking is None:
            self._asking = asyncio.get_running_loop().run_in_executor(self._thread, self._ask)
            self._asking.add_done_callback(self._take)

    def close(self) -> None:
        """An answer that is still to come is not waited for."""
        if self._asking is not None:
            self._asking.remove_done_callback(self._take)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, answer: asyncio.Future[Seen]) -> None:
        self._asking = None
        if answer.cancelled():
            return
        if error := answer.exception():
            log.error("the machine cannot be asked for its devices and disk: %s", error)
            return
        before, self.seen = self.seen, answer.result()
        if _lasting(before) != _lasting(self.seen):
            self._on_change()


def _lasting(seen: Seen) -> tuple[Device, ...]:
    """Return what of it is worth a report of its own."""
    return tuple(replace(device, memory_used_bytes=None, utilization_percent=None) for device in seen.devices)
