"""What is asked of nodes so that checkpoints lie where they will be wanted, and what was asked lately. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, NodeName

PREFETCH_AGAIN_S = 60.0
COPY_AGAIN_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """Read a checkpoint into the memory of a node, for a replica of `deployment` on `devices`. `instead_of` are the
    digests that give their room there."""

    deployment: DeploymentName
    digest: str
    node: NodeName
    devices: tuple[DeviceId, ...]
    instead_of: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCheckpoint:
    """Put one more copy of a checkpoint on the disk of a node, from where the others came."""

    checkpoint: CheckpointName
    digest: str
    source: str
    node: NodeName
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyPlan:
    prefetches: tuple[Prefetch, ...] = ()
    copies: tuple[CopyCheckpoint, ...] = ()


class Recent:
    """What was asked of nodes lately. Mutable, for one owner: what came to nothing is not asked for again at once."""

    def __init__(self) -> None:
        self._prefetched: dict[tuple[NodeName, str], float] = {}
        self._copied: dict[tuple[NodeName, str], float] = {}

    def note(self, plan: ResidencyPlan, now: float) -> None:
        self._prefetched = {key: at for key, at in self._prefetched.items() if now < at + PREFETCH_AGAIN_S}
        self._copied = {key: at for key, at in self._copied.items() if now < at + COPY_AGAIN_S}
        self._prefetched.update({(prefetch.node, prefetch.digest): now for prefetch in plan.prefetches})
        self._copied.update({(copy.node, copy.digest): now for copy in plan.copies})

    def prefetched(self, node: NodeName, digest: str, now: float) -> bool:
        at = self._prefetched.get((node, digest))
        return at is not None and now < at + PREFETCH_AGAIN_S

    def copied(self, node: NodeName, digest: str, now: float) -> bool:
        at = self._copied.get((node, digest))
        return at is not None and now < at + COPY_AGAIN_S
