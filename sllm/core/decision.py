"""Decision: why a replica was started where it was, and what came of it; and what is told of all that, or of what would
be decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sllm.core.ids import DeploymentName, DeviceId, NodeName, ReplicaId
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState
from sllm.core.request import RequestRow
from sllm.core.startup import Estimate


class WaitsOn(StrEnum):
    NODES = "nodes"  # no usable node holds the checkpoint
    DEVICES = "devices"  # those that hold it have no free devices
    MEMORY = "memory"  # their devices are too small, free or not


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node that was looked at, and why it was not taken; empty for the one that was. `estimate`: what a start there
    is expected to take, if one is possible now."""

    node: NodeName
    refused: str
    waits_on: WaitsOn | None = None
    estimate: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One start. `candidates` are the best that were looked at, `omitted` how many more there were.

    `state` is the replica's, None once it is gone; `phases_s` what its phases took that are over. `ready_at`, like
    `decided_at`, is a date; None: it was not ready, or not yet. A replica that its controller has not started itself,
    because one before it did, has no estimate, and 0 as `decided_at`.
    """

    replica: ReplicaId
    deployment: DeploymentName
    revision: int
    node: NodeName
    devices: tuple[DeviceId, ...]
    priority: Priority
    decided_at: float
    why: str
    estimate: Estimate | None = None
    candidates: tuple[Candidate, ...] = ()
    omitted: int = 0
    state: ReplicaState | None = None
    phases_s: dict[str, float] = field(default_factory=dict)
    ready_at: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What is known of a deployment, a replica or a request.

    `deployment` is the one it is of. `waits_for`: what that waits for now, empty if for nothing; `candidates`: where
    its next replica would be started now. `request`: the request asked about, if it is open; `held_at` and
    `granted_at` are dates, None where it is not known. `decisions`: the deployment's last starts, the newest first;
    of a replica its own, of a request that of the replica it is on.
    """

    deployment: DeploymentName
    waits_for: str = ""
    candidates: tuple[Candidate, ...] = ()
    request: RequestRow | None = None
    held_at: float | None = None
    granted_at: float | None = None
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStart:
    """A replica that would be started, and what that is expected to take."""

    node: NodeName
    devices: tuple[DeviceId, ...]
    why: str
    estimate: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStop:
    """A replica that would be let go; what runs on it may finish."""

    replica: ReplicaId
    deployment: DeploymentName
    node: NodeName
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """What a change of a deployment would do at once.

    `ready_s`: when the last of `starts` would be ready, None if there are none. `waits_for`: what the deployment would
    wait for beside them. `candidates`: where its next replica would be started, such as that of the first request.
    """

    deployment: DeploymentName
    revision: int
    starts: tuple[PlannedStart, ...] = ()
    stops: tuple[PlannedStop, ...] = ()
    waits_for: str = ""
    ready_s: float | None = None
    candidates: tuple[Candidate, ...] = ()
