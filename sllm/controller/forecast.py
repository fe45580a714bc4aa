"""Forecast: what migrations cost, and how long requests run on, learnt from what is reported. In memory, bounded.

After a restart nothing is known: what is not known is moved, and the first rounds tell what they take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sllm.core.device import DeviceKind
from sllm.core.ids import DeploymentName, NodeName
from sllm.core.migration import Outlook, RecomputeCost, Round
from sllm.core.request import RequestRow
from sllm.core.snapshot import NodeView, ReplicaView, Snapshot
from sllm.migration.estimate import RecomputeEstimate
from sllm.migration.length import LengthsOfAll
from sllm.migration.outlook import outlook
from sllm.migration.policy import Progress

KEPT_ESTIMATES = 1000

Key = tuple[str, DeviceKind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """What recomputing a checkpoint takes on one kind of device, and how wrong that was lately: median and 95th
    percentile of |predicted - measured| / measured; None: not known yet."""

    kind: DeviceKind
    cost: RecomputeCost
    error: tuple[float, float] | None


class Forecast:
    def __init__(self) -> None:
        self._estimates: dict[Key, RecomputeEstimate] = {}
        self._lengths = LengthsOfAll()

    def observe(self, target: ReplicaView, nodes: Mapping[NodeName, NodeView], measured: Round) -> None:
        """Learn from one round at its destination."""
        kind = kind_of(target, nodes)
        if kind is None:
            return
        key = (target.spec.digest, kind)
        if key not in self._estimates and len(self._estimates) >= KEPT_ESTIMATES:
            del self._estimates[next(iter(self._estimates))]
        estimate = self._estimates.setdefault(key, RecomputeEstimate())
        estimate.observe(measured.tokens - measured.cached_tokens, measured.seconds)

    def finished(self, row: RequestRow) -> None:
        """Learn how long a request was that its gateway reports no more: as it last was, a report interval ago."""
        if row.output_tokens:
            self._lengths.finished(row.deployment, row.output_tokens)

    def forget(self, deployment: DeploymentName) -> None:
        self._lengths.forget(deployment)

    def cost(self, replica: ReplicaView, nodes: Mapping[NodeName, NodeView]) -> RecomputeCost:
        """What recomputing takes on a replica's kind of device."""
        kind = kind_of(replica, nodes)
        estimate = self._estimates.get((replica.spec.digest, kind)) if kind else None
        return estimate.cost if estimate else RecomputeCost()

    def of(self, digest: str) -> tuple[Recompute, ...]:
        """What is known of a checkpoint, by kind of device."""
        found = [(kind, e) for (known, kind), e in self._estimates.items() if known == digest]
        return tuple(Recompute(kind=kind, cost=e.cost, error=e.error) for kind, e in sorted(found, key=lambda f: f[0]))

    def costs(self) -> Mapping[Key, RecomputeCost]:
        """What recomputing takes, of all that is known, by digest and kind of device."""
        return {key: estimate.cost for key, estimate in self._estimates.items()}

    def outlook(self, row: RequestRow, snapshot: Snapshot) -> Outlook:
        """What is expected of a request that runs, if it moved to a replica on devices like those that it is on."""
        replica = snapshot.replicas.get(row.replica) if row.replica else None
        cost = self.cost(replica, snapshot.nodes) if replica else RecomputeCost()
        choices = max(1, row.choices)
        progress = Progress(
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            interval_s=row.interval_s,
            choices=choices,
        )
        left = self._lengths.left(row.deployment, row.output_tokens, row.max_tokens)
        # The choices are made side by side.
        left_tokens = left / choices if left is not None else None
        return outlook(progress, cost, left_tokens=left_tokens, moves=row.moves)


def kind_of(replica: ReplicaView, nodes: Mapping[NodeName, NodeView]) -> DeviceKind | None:
    """The kind of the devices that a replica has; None: its node does not say."""
    view = nodes.get(replica.node)
    kinds = {device.id: device.kind for device in view.report.devices} if view else {}
    return next((kinds[device] for device in replica.spec.devices if device in kinds), None)
