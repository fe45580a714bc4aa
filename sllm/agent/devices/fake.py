"""Devices that exist in tests and simulations only."""

from __future__ import annotations

from dataclasses import replace

from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import DeviceId


class FakeDevices:
    """`count` devices `fake-0`…; `lose` makes one vanish as a driver error does."""

    def __init__(self, count: int = 1, memory_bytes: int = 1 << 30, kind: DeviceKind = DeviceKind.CPU) -> None:
        self._devices = {
            DeviceId(f"fake-{number}"): Device(
                id=DeviceId(f"fake-{number}"), kind=kind, state=DeviceState.FREE, memory_bytes=memory_bytes
            )
            for number in range(count)
        }

    def probe(self) -> tuple[Device, ...]:
        return tuple(self._devices.values())

    def lose(self, device: DeviceId) -> None:
        self._devices[device] = replace(self._devices[device], state=DeviceState.LOST)
