"""Plan: the actions that a snapshot calls for, each with its reason, and when to look again without being told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sllm.core.decision import Candidate
from sllm.core.ids import DeploymentName, DeviceId, NodeName, ReplicaId
from sllm.core.priority import Priority
from sllm.core.startup import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplica:
    """Start a replica of the deployment's current revision. Its id and generation are drawn when it is carried out.

    `candidates` are the best of the nodes that were looked at, of so many `holders` of the checkpoint; `estimate` is
    what it is expected to take on the one that was taken.
    """

    deployment: DeploymentName
    node: NodeName
    devices: tuple[DeviceId, ...]
    priority: Priority
    why: str
    estimate: Estimate | None = None
    candidates: Sequence[Candidate] = ()
    holders: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RaisePriority:
    """A request has come to wait for a replica that was started ahead of requests."""

    replica: ReplicaId
    priority: Priority
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReplica:
    """`room_for` is the deployment that waits for its devices, if one does."""

    replica: ReplicaId
    why: str
    room_for: DeploymentName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplica:
    """`room_for` is the deployment that waits for its devices, if one does."""

    replica: ReplicaId
    why: str
    room_for: DeploymentName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRequests:
    """Empty a replica for `room_for`, which waits for its devices: what runs on it goes on elsewhere, and then it ends.

    `to` are the nodes where there is room for it, or will be: a start there is in the same plan. `free_s` is when its
    devices are expected to be free.
    """

    replica: ReplicaId
    room_for: DeploymentName
    to: tuple[NodeName, ...]
    free_s: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepReplica:
    """Nobody waits any more for the devices of a replica that is emptied: it stays, with what runs on it."""

    replica: ReplicaId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveDeployment:
    """Its last replica is gone: forget a deleted deployment."""

    deployment: DeploymentName


Action = StartReplica | RaisePriority | DrainReplica | StopReplica | MoveRequests | KeepReplica | RemoveDeployment


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """What a deployment waits for. `detail`, which names nodes, is for operators, not for who sends requests; so are
    the `candidates`, if it waits for devices of one of them."""

    text: str
    detail: str = ""
    candidates: tuple[Candidate, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} ({self.detail})" if self.detail else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`reasons` says, for deployments that do not have what they need, what they wait for. `wakes`: when to look at a
    deployment again without being told; `wake_at` is the first of all times to look again."""

    actions: tuple[Action, ...] = ()
    reasons: Mapping[DeploymentName, Reason] = field(default_factory=dict)
    wake_at: float | None = None
    wakes: Mapping[DeploymentName, float] = field(default_factory=dict)
