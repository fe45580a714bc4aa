"""The cluster as a simulation begins from it, told from a snapshot. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from sllm.controller import status
from sllm.controller.forecast import Forecast
from sllm.core.description import (
    ClusterDescription,
    DescribedDeployment,
    DescribedReplica,
    KnownReading,
    KnownRecompute,
    KnownStarts,
)
from sllm.core.request import RequestRow
from sllm.core.snapshot import DeploymentView, Snapshot
from sllm.core.startup import Learnt


def describe(snapshot: Snapshot, rows: Iterable[RequestRow], forecast: Forecast, now: float) -> ClusterDescription:
    """All but deployments that are being deleted: nothing new comes to them."""
    views = (view for _, view in sorted(snapshot.deployments.items()) if not view.current.deployment.deleting)
    replicas = sorted(snapshot.replicas.values(), key=lambda replica: (replica.spec.generation, replica.spec.id))
    return ClusterDescription(
        policy=snapshot.policy,
        nodes=tuple(status.node(view) for _, view in sorted(snapshot.nodes.items())),
        deployments=tuple(_deployment(view, now) for view in views),
        replicas=tuple(DescribedReplica(node=r.node, status=status.judged(r)) for r in replicas),
        requests=status.request_list(rows, snapshot.replicas).requests,
        reading=_reading(snapshot.learnt),
        starts=_starts(snapshot.learnt),
        recomputes=tuple(
            KnownRecompute(digest=digest, kind=kind, cost=cost) for (digest, kind), cost in forecast.costs().items()
        ),
    )


def _deployment(view: DeploymentView, now: float) -> DescribedDeployment:
    return DescribedDeployment(
        deployment=view.current.deployment,
        max_model_len=view.current.max_model_len,
        size_bytes=view.current.size_bytes,
        needed=view.needed,
        unneeded_s=tuple(now - at for at in view.needed_at),
    )


def _reading(learnt: Learnt) -> tuple[KnownReading, ...]:
    here = (KnownReading(node=node, tier=tier, level=level) for (node, tier), level in learnt.reading.items())
    anywhere = (KnownReading(node=None, tier=tier, level=level) for tier, level in learnt.reading_anywhere.items())
    return (*here, *anywhere)


def _starts(learnt: Learnt) -> tuple[KnownStarts, ...]:
    of_it = (KnownStarts(digest=digest, kind=kind, times=times) for (digest, kind), times in learnt.starts.items())
    of_kind = (KnownStarts(digest=None, kind=kind, times=times) for kind, times in learnt.starts_of_kind.items())
    return (*of_it, *of_kind)
