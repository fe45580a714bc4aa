"""Residency: which checkpoint is held on which tier of a node, in which state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from sllm.core.ids import CheckpointName


class Tier(IntEnum):
    """Tiers, the slowest first, so that `max` is the fastest (paper §1). DEVICE is printed `GPU` for CUDA."""

    REMOTE = 0
    SSD = 1
    DRAM = 2
    DEVICE = 3


class ResidencyState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """A copy of a checkpoint on one tier of the node that reports it."""

    checkpoint: CheckpointName
    digest: str
    tier: Tier
    state: ResidencyState
    size_bytes: int
    generation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUsage:
    """Room on one tier of a node, in bytes. `used_bytes` counts checkpoints only."""

    tier: Tier
    capacity_bytes: int
    used_bytes: int
