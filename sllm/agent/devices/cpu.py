"""CPU slots: shares of this machine's cores and memory that are leased as if they were devices."""

from __future__ import annotations

import os

import psutil

from sllm.config import DevicesConfig
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import DeviceId


class CpuSlots:
    """Slots of equal size. They never change while the agent runs, whatever the machine's load is."""

    def __init__(self, *, slots: int, threads: int, memory_bytes: int, model: str) -> None:
        self._devices = tuple(
            Device(
                id=DeviceId(f"cpu-{number}"),
                kind=DeviceKind.CPU,
                state=DeviceState.FREE,
                memory_bytes=memory_bytes,
                model=model,
                threads=threads,
            )
            for number in range(slots)
        )

    @classmethod
    def measured(cls, config: DevicesConfig, *, reserved_bytes: int) -> CpuSlots:
        """Divide this machine's cores and free memory, where the configuration does not say."""
        slots = config.cpu_slots
        free = max(0, psutil.virtual_memory().available - reserved_bytes)
        return cls(
            slots=slots,
            threads=config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // slots),
            memory_bytes=config.memory_bytes or free // slots,
            model=_cpu_model(),
        )

    def probe(self) -> tuple[Device, ...]:
        return self._devices


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, "")
    except OSError:
        return ""
