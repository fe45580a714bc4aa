"""Devices: CPU slots, and GPUs as the driver's library tells of them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sllm.agent.devices import open_devices
from sllm.agent.devices.cpu import CpuSlots
from sllm.agent.devices.nvml import NvmlDevices
from sllm.config import DevicesConfig
from sllm.core.device import DeviceKind, DeviceState
from sllm.errors import InvalidConfiguration


class NVMLError(Exception):
    pass


class Library:
    """Stands for the module pynvml and the driver beneath it."""

    NVMLError = NVMLError

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.silent: set[str] = set()

    def nvmlInit(self) -> None:
        self._ask("init")

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        self._ask(f"memory {handle}")
        return SimpleNamespace(total=1000, used=100 + handle)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        self._ask("utilization")
        return SimpleNamespace(gpu=50)

    def _ask(self, what: str) -> None:
        if what in self.silent:
            raise NVMLError(what)


def test_gpus_are_known_by_uuid() -> None:
    first, second = NvmlDevices(Library(), []).probe()
    assert (first.id, second.id) == ("GPU-0", "GPU-1")
    assert (first.kind, first.state, first.model) == (DeviceKind.CUDA, DeviceState.FREE, "NVIDIA H200")
    assert (second.memory_bytes, second.memory_used_bytes, second.utilization_percent) == (1000, 101, 50)


def test_some_gpus_can_be_chosen_and_must_be_there() -> None:
    assert [device.id for device in NvmlDevices(Library(), ["GPU-1"]).probe()] == ["GPU-1"]
    with pytest.raises(InvalidConfiguration, match="GPU-9"):
        NvmlDevices(Library(), ["GPU-9"])


def test_what_the_driver_does_not_tell_is_unknown_and_a_lost_gpu_is_lost() -> None:
    library = Library()
    devices = NvmlDevices(library, [])
    library.silent = {"utilization", "memory 1"}
    first, second = devices.probe()
    assert (first.state, first.utilization_percent) == (DeviceState.FREE, None)
    assert (second.state, second.memory_bytes, second.memory_used_bytes) == (DeviceState.LOST, 1000, None)


def test_without_a_driver_there_are_cpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    library.silent = {"init"}
    monkeypatch.setitem(sys.modules, "pynvml", library)
    devices = open_devices(DevicesConfig(cpu_slots=2, cpu_threads=3, memory_bytes=77), reserved_bytes=0).probe()
    assert [(d.id, d.kind, d.threads, d.memory_bytes) for d in devices] == [
        ("cpu-0", DeviceKind.CPU, 3, 77),
        ("cpu-1", DeviceKind.CPU, 3, 77),
    ]
    with pytest.raises(InvalidConfiguration, match="no NVIDIA driver"):
        open_devices(DevicesConfig(kind="cuda"), reserved_bytes=0)


def test_with_a_driver_there_are_gpus_unless_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Library())
    assert isinstance(open_devices(DevicesConfig(), reserved_bytes=0), NvmlDevices)
    assert isinstance(open_devices(DevicesConfig(kind="cpu"), reserved_bytes=0), CpuSlots)
    monkeypatch.setitem(sys.modules, "pynvml", Library(count=0))
    assert isinstance(open_devices(DevicesConfig(), reserved_bytes=0), CpuSlots)


def test_slots_share_what_the_pool_leaves() -> None:
    all_of_it = CpuSlots.measured(DevicesConfig(), reserved_bytes=0).probe()[0].memory_bytes
    half = CpuSlots.measured(DevicesConfig(cpu_slots=2), reserved_bytes=0).probe()[0].memory_bytes
    assert 0 < half < all_of_it
    assert CpuSlots.measured(DevicesConfig(), reserved_bytes=1 << 60).probe()[0].memory_bytes == 0
