"""Route: deployment -> replicas a gateway may send to, and what a gateway needs to make its front end."""

from __future__ import annotations

from dataclasses import dataclass

from sllm.core.deployment import Deployment
from sllm.core.ids import NodeName, ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTarget:
    """A ready replica. A request sent to it carries `generation`, which the engine host checks."""

    replica: ReplicaId
    node: NodeName
    address: str
    generation: int
    revision: int
    capacity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """All that a gateway needs of one deployment. `sources` are agents that hold its execution files."""

    deployment: Deployment
    max_model_len: int
    targets: tuple[RouteTarget, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """Replaces the one before it. `revision` grows; a gateway keeps the last one when the controller is away."""

    epoch: int
    revision: int
    routes: tuple[Route, ...] = ()
