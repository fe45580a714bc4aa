"""Replica: one running copy of a deployment on a simulated node, from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm.core.ids import NodeName
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus, StartPhase
from sllm.core.residency import Tier
from sllm.sim.loading import Load
from sllm.sim.pool import Copy
from sllm.sim.request import Request
from sllm.sim.spec import ModelSpec


@dataclass(slots=True, eq=False)
class Replica:
    """`tier` is from where it is started; `copy_s` is what its bytes take from memory to its devices, if they are not
    read from SSD. `running` are its requests, by number. `silent`: its node is gone, and nobody knows yet."""

    spec: ReplicaSpec
    model: ModelSpec
    node: NodeName
    priority: Priority
    began_at: float
    state: ReplicaState = ReplicaState.STARTING
    phase: StartPhase = StartPhase.QUEUED
    phase_since: float = 0.0
    phases_s: dict[str, float] = field(default_factory=dict)
    tier: Tier = Tier.SSD
    copy_s: float = 0.0
    ready_at: float = 0.0
    load: Load | None = None
    copy: Copy | None = None
    running: dict[int, Request] = field(default_factory=dict)
    silent: bool = False
    _told: ReplicaStatus | None = None

    def enter(self, phase: StartPhase, now: float) -> None:
        """Begin a phase of the start; what comes before it is over."""
        self.phases_s[self.phase.value] = now - self.phase_since
        for skipped in StartPhase:
            if skipped is phase:
                break
            self.phases_s.setdefault(skipped.value, 0.0)
        self.phase, self.phase_since = phase, now

    def status(self) -> ReplicaStatus:
        """What is reported of it; while nothing changes, the same value."""
        last = self._told
        if last is None or (last.state, last.phase, last.running) != (self.state, self.phase, len(self.running)):
            self._told = self._status()
        assert self._told is not None
        return self._told

    def _status(self) -> ReplicaStatus:
        return ReplicaStatus(
            spec=self.spec,
            state=self.state,
            phase=self.phase,
            address=f"{self.node}/{self.spec.id}" if self.ready_at else "",
            phases_s=dict(self.phases_s),
            started_at=self.began_at,
            ready_at=self.ready_at,
            running=len(self.running),
            memory_bytes=self.model.checkpoint.size_bytes,
        )
