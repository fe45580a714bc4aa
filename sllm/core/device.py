"""Device: one GPU, or one slot of CPU cores and memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sllm.core.ids import DeviceId


class DeviceKind(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class DeviceState(StrEnum):
    FREE = "free"
    LEASED = "leased"
    DIRTY = "dirty"  # released, but its memory is not yet seen to be free
    LOST = "lost"  # the driver no longer answers for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as its node sees it. `threads` is the CPU lease that comes with it."""

    id: DeviceId
    kind: DeviceKind
    state: DeviceState
    memory_bytes: int
    model: str = ""
    threads: int = 1
    memory_used_bytes: int | None = None  # None: the driver does not tell
    utilization_percent: int | None = None
