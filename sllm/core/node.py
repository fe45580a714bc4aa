"""Node: a GPU server, as its agent reports it and as the controller judges it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sllm.core.checkpoint import Checkpoint
from sllm.core.device import Device
from sllm.core.ids import DeviceId, NodeName
from sllm.core.replica import ReplicaStatus
from sllm.core.residency import Residency, Tier, TierUsage


class NodeState(StrEnum):
    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"  # heartbeats are missing: nothing new is placed here, what runs goes on
    DRAINING = "draining"
    CORDONED = "cordoned"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One load that ended well: what the bandwidth of a tier is estimated from (paper §5.1).

    `size_bytes` came from `tier` in `read_s` seconds, and waited `queue_s` seconds in the node's loading queue: before
    it was read, and while others interrupted it. `number` grows with each load of an agent's incarnation; `digest` is
    the checkpoint's.
    """

    number: int
    digest: str
    size_bytes: int
    tier: Tier
    queue_s: float
    read_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """The whole state of a node, as its agent sees it. Level-triggered: the latest report is the truth.

    `incarnation` is drawn anew by each start of an agent; `revision` grows with each change within an incarnation.
    `architectures` lists what the node's engine can serve; empty means that it is not known yet. `loads` are the last
    loads, the oldest first; `probe` is a short measurement of its disk, as if it had been one.
    """

    name: NodeName
    incarnation: str
    revision: int
    address: str
    version: str
    engine: str
    warm: bool
    devices: tuple[Device, ...] = ()
    tiers: tuple[TierUsage, ...] = ()
    residencies: tuple[Residency, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()
    architectures: tuple[str, ...] = ()
    loads: tuple[LoadReport, ...] = ()
    probe: LoadReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cordon:
    """What of a node takes nothing new: all of it (`node`), or some `devices`.

    What runs there stays, unless the node is `draining`: then it is moved away, or waited for.
    """

    node: bool = False
    devices: frozenset[DeviceId] = frozenset()
    draining: bool = False


OPEN: Final = Cordon()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node as the controller knows it: the last report, and the controller's judgement of it."""

    report: NodeReport
    state: NodeState
    last_seen: float
    cordoned: bool = False
    cordoned_devices: tuple[DeviceId, ...] = ()
