"""Replica: one running copy of a deployment, in one engine host."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, ReplicaId


class ReplicaState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


class StartPhase(StrEnum):
    """Phases of a replica's start, in order. Their durations add up to its activation time."""

    QUEUED = "queued"  # waits for the node's loading queue or for the warm process
    FORKING = "forking"  # warm process -> engine host
    LOADING = "loading"  # SSD -> DRAM, while the engine is under construction
    BUILDING = "building"  # the rest of the construction, DRAM -> device included
    READY = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """All that an agent needs to start a replica. Decided by the controller; never changed afterwards."""

    id: ReplicaId
    deployment: DeploymentName
    revision: int
    generation: int
    checkpoint: CheckpointName
    digest: str
    devices: tuple[DeviceId, ...]
    capacity: int
    max_model_len: int
    engine_args: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """What an agent reports of a replica.

    `progress` is the done share (0..1) of the current phase; `phases_s` has the seconds of the phases that are over;
    `error` and `error_reason` (of `sllm.errors`) say why it failed; `address` is the engine host's, once it listens.
    """

    spec: ReplicaSpec
    state: ReplicaState
    phase: StartPhase = StartPhase.QUEUED
    progress: float = 0.0
    address: str = ""
    pid: int = 0
    error: str = ""
    error_reason: str = ""
    phases_s: dict[str, float] = field(default_factory=dict)
    started_at: float = 0.0
    ready_at: float = 0.0
    running: int = 0
    waiting: int = 0
    memory_bytes: int = 0
