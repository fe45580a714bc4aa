"""GPUs through NVIDIA's management library. Touches the driver, never a CUDA context."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import DeviceId
from sllm.errors import InvalidConfiguration

T = TypeVar("T")


class NvmlDevices:
    """The GPUs of this node by UUID. `nvml` is the module pynvml, already initialised."""

    def __init__(self, nvml: Any, uuids: Sequence[str]) -> None:
        self._nvml = nvml
        found = {self._uuid(handle): handle for handle in self._handles()}
        absent = [uuid for uuid in uuids if uuid not in found]
        if absent:
            raise InvalidConfiguration(
                f"devices.uuids names {absent[0]}, which this node does not have", hint=f"it has: {', '.join(found)}"
            )
        self._chosen = {uuid: found[uuid] for uuid in uuids or found}
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, len(self._chosen)))
        self._last = {uuid: self._first_look(uuid, handle, threads) for uuid, handle in self._chosen.items()}

    @classmethod
    def open(cls, uuids: Sequence[str]) -> NvmlDevices | None:
        """Return None where there is no driver, no pynvml, or no GPU."""
        try:
            import pynvml  # here, because nodes without GPUs may lack it

            pynvml.nvmlInit()
        except ImportError:
            return None
        except pynvml.NVMLError:
            return None
        devices = cls(pynvml, uuids)
        return devices if devices.probe() else None

    def probe(self) -> tuple[Device, ...]:
        self._last = {uuid: self._look(self._last[uuid], handle) for uuid, handle in self._chosen.items()}
        return tuple(self._last.values())

    def _handles(self) -> list[Any]:
        count = self._nvml.nvmlDeviceGetCount()
        return [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    def _uuid(self, handle: Any) -> str:
        return _text(self._nvml.nvmlDeviceGetUUID(handle))

    def _first_look(self, uuid: str, handle: Any, threads: int) -> Device:
        memory = self._asked(lambda: self._nvml.nvmlDeviceGetMemoryInfo(handle))
        name = self._asked(lambda: self._nvml.nvmlDeviceGetName(handle))
        return Device(
            id=DeviceId(uuid),
            kind=DeviceKind.CUDA,
            state=DeviceState.FREE if memory else DeviceState.LOST,
            memory_bytes=int(memory.total) if memory else 0,
            model=_text(name or ""),
            threads=threads,
        )

    def _look(self, last: Device, handle: Any) -> Device:
        memory = self._asked(lambda: self._nvml.nvmlDeviceGetMemoryInfo(handle))
        rates = self._asked(lambda: self._nvml.nvmlDeviceGetUtilizationRates(handle))
        return Device(
            id=last.id,
            kind=last.kind,
            state=DeviceState.FREE if memory else DeviceState.LOST,
            memory_bytes=int(memory.total) if memory else last.memory_bytes,
            model=last.model,
            threads=last.threads,
            memory_used_bytes=int(memory.used) if memory else None,
            utilization_percent=int(rates.gpu) if rates else None,
        )

    def _asked(self, question: Callable[[], T]) -> T | None:
        """What the driver does not tell (not supported, GPU lost) is unknown, not zero."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
