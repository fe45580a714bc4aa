"""Devices: what a node has to run replicas on."""

from __future__ import annotations

from sllm.agent.devices.base import DeviceSource
from sllm.agent.devices.cpu import CpuSlots
from sllm.agent.devices.nvml import NvmlDevices
from sllm.config import DevicesConfig
from sllm.errors import InvalidConfiguration


def open_devices(config: DevicesConfig, *, reserved_bytes: int) -> DeviceSource:
    """Open what the configuration asks for; `auto` falls back to CPU slots where there is no NVIDIA driver.

    `reserved_bytes` of memory are the DRAM pool's, not the slots'. Raises InvalidConfiguration.
    """
    if config.kind != "cpu":
        gpus = NvmlDevices.open(config.uuids)
        if gpus is not None:
            return gpus
    if config.kind == "cuda":
        raise InvalidConfiguration(
            'devices.kind is "cuda", but no NVIDIA driver answers', hint='install it, or use kind = "cpu"'
        )
    return CpuSlots.measured(config, reserved_bytes=reserved_bytes)
