"""Snapshot: the cluster as the controller knows it at one instant. Immutable; every decision is made from one.

Times are seconds of the controller's monotonic clock, except `last_seen`, which is for people (wall clock).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import Deployment
from sllm.core.ids import DeploymentName, DeviceId, NodeName, ReplicaId, RequestId
from sllm.core.migration import Outlook
from sllm.core.node import OPEN, Cordon, NodeReport, NodeState
from sllm.core.popularity import Popularity
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus
from sllm.core.residency import ResidencyState, Tier
from sllm.core.startup import NOTHING_LEARNT, Learnt

if TYPE_CHECKING:
    from sllm.core.index import Index


class Intent(StrEnum):
    """What the controller wants of a replica. It only ever moves downwards."""

    RUN = "run"
    DRAIN = "drain"  # no new requests; running ones may finish
    STOP = "stop"


class Command(StrEnum):
    """How far the command that carries out an intent has come."""

    DUE = "due"  # to be given, again perhaps, but not before `retry_at`
    SENT = "sent"
    DONE = "done"  # the agent accepted it


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The numbers that decisions depend on, from the controller's configuration."""

    heartbeat_s: float = 2.0
    suspect_s: float = 6.0
    dead_s: float = 15.0
    drain_s: float = 60.0
    start_backoff_s: float = 1.0
    max_start_failures: int = 3
    stable_after_s: float = 10.0  # a replica that dies sooner after it became ready counts as a failed start
    displace: bool = True  # move what runs, where that lets requests that wait begin sooner
    min_loaded_s: float = 1.0  # a replica that is ready for less makes no room for another deployment
    prefetch: bool = False  # nodes read into memory what their next start would have to read
    max_copies: int = 1  # of a checkpoint, up to which copies are made unasked; 1: none is
    swap_hold_s: float = 30.0  # requests are held so long at most so that a kept replica need not make room yet


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """A replica: what is wanted of it, and what its node last said. `status` None: no report has shown it yet;
    `ready_at`: when one first showed it ready. `priority` is that of its start, as far as its agent surely knows it.
    `room_for`: the deployment that waits for its devices. It is `displaced` while its requests are moved away for that;
    one whose displacement was given up is none again before `spared_until`. `leaving`: it is displaced, or its node
    drains; it gets no new requests, and is told to end when it has none."""

    spec: ReplicaSpec
    node: NodeName
    intent: Intent = Intent.RUN
    command: Command = Command.SENT
    priority: Priority = Priority.REQUEST
    retry_at: float = 0.0
    status: ReplicaStatus | None = None
    ready_at: float | None = None
    leaving: bool = False
    room_for: DeploymentName | None = None
    spared_until: float = 0.0

    @property
    def displaced(self) -> bool:
        """True if it is emptied for another deployment; that can be taken back until it is told to end."""
        return self.room_for is not None and self.intent is Intent.RUN

    @property
    def state(self) -> ReplicaState:
        """The judged state: what is reported, unless more than that is already decided."""
        reported = self.status.state if self.status else ReplicaState.STARTING
        if reported in (ReplicaState.FAILED, ReplicaState.STOPPING):
            return reported
        if self.intent is Intent.STOP:
            return ReplicaState.STOPPING
        return ReplicaState.DRAINING if self.leaving or self.intent is Intent.DRAIN else reported

    @property
    def serves(self) -> bool:
        """True if it can go on with requests that it has, or resume such that are moved to it."""
        return self.status is not None and self.status.state in (ReplicaState.READY, ReplicaState.DRAINING)

    @property
    def ready(self) -> bool:
        """True if new requests may be sent to it."""
        wanted = self.intent is Intent.RUN and not self.leaving
        return wanted and self.status is not None and self.status.state is ReplicaState.READY

    @property
    def starting(self) -> bool:
        return self.intent is Intent.RUN and self.state is ReplicaState.STARTING

    @property
    def live(self) -> bool:
        """True if it serves, or will."""
        return self.ready or self.starting


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node: its last report, and the controller's judgement of it."""

    report: NodeReport
    state: NodeState
    seen_at: float
    last_seen: float
    cordon: Cordon = OPEN

    def tier_of(self, digest: str) -> Tier | None:
        """The fastest tier that holds the checkpoint, or None if there is no copy at rest (SSD) to start from."""
        tiers = [r.tier for r in self.report.residencies if r.digest == digest and r.state is ResidencyState.READY]
        return max(tiers) if Tier.SSD in tiers else None

    def in_memory(self, digest: str) -> bool:
        """True if a start has nothing to read from SSD."""
        return any(
            r.digest == digest and r.tier is Tier.DRAM and r.state is ResidencyState.READY
            for r in self.report.residencies
        )

    def stored_bytes(self, digest: str) -> int:
        """The size of its copy at rest; 0: there is none."""
        copies = (r.size_bytes for r in self.report.residencies if r.digest == digest and r.tier is Tier.SSD)
        return max(copies, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Failed starts, in a row, of one revision. Nothing is started before `retry_at`.

    `given_up`: so many that requests are no longer held for it; `nodes` are where it went wrong.
    """

    revision: int
    count: int
    retry_at: float
    given_up: bool = False
    error: str = ""
    reason: str = ""
    nodes: frozenset[NodeName] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """A deployment at one revision, with what its checkpoint said when it was deployed."""

    deployment: Deployment
    max_model_len: int
    size_bytes: int

    @property
    def number(self) -> int:
        return self.deployment.revision

    def replica(self, *, id: ReplicaId, generation: int, devices: tuple[DeviceId, ...]) -> ReplicaSpec:  # noqa: A002
        """What is told to an agent of a replica of this revision."""
        wish = self.deployment.spec
        return ReplicaSpec(
            id=id,
            deployment=wish.name,
            revision=self.number,
            generation=generation,
            checkpoint=wish.checkpoint,
            digest=self.deployment.digest,
            devices=devices,
            capacity=wish.capacity,
            max_model_len=self.max_model_len,
            engine_args=wish.engine_args,
        )

    def made(self, spec: ReplicaSpec) -> bool:
        """True if `spec` is of a replica of this revision. A deleted deployment's numbers may have come again."""
        wish = self.deployment.spec
        return (spec.revision, spec.digest, spec.capacity, spec.max_model_len, len(spec.devices)) == (
            self.number,
            self.deployment.digest,
            wish.capacity,
            self.max_model_len,
            wish.devices,
        ) and spec.engine_args == wish.engine_args


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentView:
    """A deployment and the memory of its scaling.

    `earlier` are replaced revisions whose replicas may still serve. `needed` is how many replicas were needed when
    last looked at, and `needed_at[k]` the last instant at which more than k were. `overcome` are the failures that a
    replica's becoming ready at `overcome_at` has ended, for now.
    """

    current: Revision
    earlier: tuple[Revision, ...] = ()
    needed: int = 0
    needed_at: tuple[float, ...] = ()
    failures: Failures | None = None
    overcome: Failures | None = None
    overcome_at: float = 0.0

    @property
    def name(self) -> DeploymentName:
        return self.current.deployment.spec.name

    def revisions(self) -> tuple[Revision, ...]:
        """All that may have replicas, the newest first."""
        return (self.current, *self.earlier)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Requests that wait for a replica of one deployment, the oldest since `since`."""

    count: int
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """`loads` counts requests per replica. `settled` is False while nodes known before a restart may yet report;
    `loads_fresh` is False while a gateway's report is overdue: then nothing is scaled down. `pinned` replicas are ends
    of a migration that somebody asked for: they are not let go because they are more than is needed. `learnt` is what
    startup times are estimated from; `popularity` has the deployments that were asked for lately. `due` are the
    deployments for which there may be anything to do since the last plan; None: all. `index` is what was kept of it
    (`Index.of`), if it was. `running` is what is expected of the requests of each replica: known only while requests of
    other deployments are held, for which they might give way."""

    policy: Policy
    nodes: Mapping[NodeName, NodeView]
    replicas: Mapping[ReplicaId, ReplicaView]
    deployments: Mapping[DeploymentName, DeploymentView]
    loads: Mapping[ReplicaId, int]
    held: Mapping[DeploymentName, Held]
    settled: bool = True
    loads_fresh: bool = True
    pinned: frozenset[ReplicaId] = frozenset()
    learnt: Learnt = NOTHING_LEARNT
    running: Mapping[ReplicaId, Mapping[RequestId, Outlook]] = field(default_factory=dict)
    popularity: Mapping[DeploymentName, Popularity] = field(default_factory=dict)
    due: frozenset[DeploymentName] | None = None
    index: Index | None = field(default=None, compare=False, repr=False)

    def replicas_by_deployment(self) -> dict[DeploymentName, list[ReplicaView]]:
        """Replicas of each deployment, the oldest first."""
        found: dict[DeploymentName, list[ReplicaView]] = {}
        for replica in sorted(self.replicas.values(), key=lambda r: (r.spec.generation, r.spec.id)):
            found.setdefault(replica.spec.deployment, []).append(replica)
        return found

    def checkpoints(self) -> dict[str, Checkpoint]:
        """Checkpoints by name, of nodes that are not dead; where content differs, the newest."""
        found: dict[str, Checkpoint] = {}
        for view in self.nodes.values():
            if view.state is NodeState.DEAD:
                continue
            for checkpoint in view.report.checkpoints:
                other = found.get(checkpoint.name)
                if other is None or (other.created_at, other.digest) < (checkpoint.created_at, checkpoint.digest):
                    found[checkpoint.name] = checkpoint
        return found
