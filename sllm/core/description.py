"""Description: a live cluster as its controller knows it at one instant, with what it has learnt. What a simulation
begins from (`sllm simulate --from-cluster`). Values only, no secret among them; times are seconds before that instant.
"""

from __future__ import annotations

from dataclasses import dataclass

from sllm.core.deployment import Deployment
from sllm.core.device import DeviceKind
from sllm.core.ids import NodeName
from sllm.core.migration import RecomputeCost
from sllm.core.node import Node
from sllm.core.replica import ReplicaStatus
from sllm.core.request import RequestRow
from sllm.core.residency import Tier
from sllm.core.snapshot import Policy
from sllm.core.startup import Level, StartTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownReading:
    """Seconds per byte of one tier of a node; of no node: of nodes of which nothing of their own is known."""

    node: NodeName | None
    tier: Tier
    level: Level


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownStarts:
    """What starts of a checkpoint take on a kind of device; of no digest: of checkpoints never started there."""

    digest: str | None
    kind: DeviceKind
    times: StartTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRecompute:
    digest: str
    kind: DeviceKind
    cost: RecomputeCost


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedReplica:
    """`status.state` is the judged one: what is decided of it goes before what its node last said."""

    node: NodeName
    status: ReplicaStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedDeployment:
    """`needed`: replicas that it needs now; `unneeded_s[k]`: for how long no more than k have been needed."""

    deployment: Deployment
    max_model_len: int
    size_bytes: int
    needed: int = 0
    unneeded_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterDescription:
    """`requests` are those that are open, held or running."""

    policy: Policy
    nodes: tuple[Node, ...] = ()
    deployments: tuple[DescribedDeployment, ...] = ()
    replicas: tuple[DescribedReplica, ...] = ()
    requests: tuple[RequestRow, ...] = ()
    reading: tuple[KnownReading, ...] = ()
    starts: tuple[KnownStarts, ...] = ()
    recomputes: tuple[KnownRecompute, ...] = ()
