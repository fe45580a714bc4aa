"""Decisions: why each replica was started where it was, and how that went. In memory, bounded; gone with a restart."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from sllm.core.decision import Candidate, Decision
from sllm.core.ids import DeploymentName, ReplicaId
from sllm.core.replica import ReplicaSpec, ReplicaStatus
from sllm.scheduler.plan import StartReplica

KEPT = 8  # of each deployment
KEPT_IN_ALL = 4000
KEPT_CANDIDATES = 16  # of each decision


class Decisions:
    def __init__(self) -> None:
        self._by_replica: dict[ReplicaId, Decision] = {}
        self._of: dict[DeploymentName, deque[ReplicaId]] = {}

    def made(self, action: StartReplica, spec: ReplicaSpec, wall: float) -> None:
        """A replica is told to start."""
        told = told_of(action.candidates)
        decision = Decision(
            replica=spec.id,
            deployment=spec.deployment,
            revision=spec.revision,
            node=action.node,
            devices=action.devices,
            priority=action.priority,
            decided_at=wall,
            why=action.why,
            estimate=action.estimate,
            candidates=told,
            omitted=max(action.holders, len(action.candidates)) - len(told),
        )
        self._of.setdefault(spec.deployment, deque()).append(spec.id)
        self._by_replica[spec.id] = decision
        if len(self._of[spec.deployment]) > KEPT:
            self._drop(spec.deployment)
        elif len(self._by_replica) > KEPT_IN_ALL:
            self._drop(next(iter(self._by_replica.values())).deployment)

    def ready(self, status: ReplicaStatus, wall: float) -> Decision | None:
        """It has become ready, for the first time: return what was decided, with what its phases took."""
        decision = self._by_replica.get(status.spec.id)
        if decision is None or decision.ready_at is not None:
            return None
        decision = replace(decision, phases_s=dict(status.phases_s), ready_at=wall)
        self._by_replica[decision.replica] = decision
        return decision

    def failed(self, replica: ReplicaId, error: str, phases_s: dict[str, float]) -> None:
        decision = self._by_replica.get(replica)
        if decision is not None:
            self._by_replica[replica] = replace(decision, error=error, phases_s=dict(phases_s))

    def forget(self, deployment: DeploymentName) -> None:
        for replica in self._of.pop(deployment, ()):
            del self._by_replica[replica]

    def _drop(self, deployment: DeploymentName) -> None:
        """The oldest of a deployment goes."""
        del self._by_replica[self._of[deployment].popleft()]
        if not self._of[deployment]:
            del self._of[deployment]

    def get(self, replica: ReplicaId) -> Decision | None:
        return self._by_replica.get(replica)

    def of(self, deployment: DeploymentName) -> list[Decision]:
        """The last ones of a deployment, the newest first."""
        return [self._by_replica[replica] for replica in reversed(self._of.get(deployment, ()))]


def told_of(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates that are told of where there are many: the one that was taken, then the soonest, then those where
    no start was possible."""

    def key(candidate: Candidate) -> tuple[bool, float, str]:
        total_s = candidate.estimate.total_s if candidate.estimate else float("inf")
        return (candidate.refused != "", total_s, candidate.node)

    return tuple(sorted(candidates, key=key)[:KEPT_CANDIDATES])
