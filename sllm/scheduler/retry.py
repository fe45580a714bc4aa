"""What failed starts mean: when to try again, and when to stop holding requests for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sllm.core.ids import NodeName
from sllm.core.node import NodeState
from sllm.core.residency import ResidencyState
from sllm.core.snapshot import DeploymentView, Failures, NodeView, Policy
from sllm.errors import CapacityExceeded, EngineFailed, InvalidArgument, InvalidCheckpoint, StaleLayout, reasons_of

COOL_DOWN_S = 300.0

# As permanent as those below, but perhaps only where it was tried: that node is short of memory, or its copy is wrong.
OF_ONE_NODE = reasons_of(CapacityExceeded) | reasons_of(InvalidCheckpoint)
# Reasons that a second try would only repeat. (A stale layout is made anew.)
PERMANENT = reasons_of(InvalidArgument) - OF_ONE_NODE - reasons_of(StaleLayout)


def failed(
    view: DeploymentView,
    node: NodeName,
    revision: int,
    *,
    error: str,
    reason: str,
    now: float,
    policy: Policy,
    holders: frozenset[NodeName],
    ready_at: float | None = None,
) -> DeploymentView:
    """Count a failed start of the deployment's current revision; one of an earlier revision changes nothing.

    `holders` are the nodes that have the checkpoint; `ready_at`: when the replica became ready, if it did. One that
    dies soon after counts as one that never was: else what dies again and again would be started without end.
    """
    if revision != view.current.number:
        return view
    before = view.failures or _overcome(view, ready_at, now, policy)
    before = before or Failures(revision=revision, count=0, retry_at=now)
    count = before.count + 1
    nodes = before.nodes | {node}
    permanent = reason in PERMANENT or (reason in OF_ONE_NODE and holders <= nodes)
    wait_s = COOL_DOWN_S if permanent else min(COOL_DOWN_S, policy.start_backoff_s * 2.0 ** min(count - 1, 30))
    failures = Failures(
        revision=revision,
        count=count,
        retry_at=now + wait_s,
        given_up=permanent or count >= policy.max_start_failures,
        error=error,
        reason=reason,
        nodes=nodes,
    )
    return replace(view, failures=failures)


def hindered(
    view: DeploymentView, node: NodeName, revision: int, *, error: str, reason: str, now: float, policy: Policy
) -> DeploymentView:
    """Put off the next start: a node could not be reached or had other plans, which says nothing of the model."""
    if revision != view.current.number:
        return view
    before = view.failures or Failures(revision=revision, count=0, retry_at=now, error=error, reason=reason)
    retry_at = max(before.retry_at, now + policy.heartbeat_s)
    return replace(view, failures=replace(before, retry_at=retry_at, nodes=before.nodes | {node}))


def succeeded(view: DeploymentView, revision: int, now: float) -> DeploymentView:
    """A replica became ready: what failed before counts no more, unless this one does not last."""
    if view.failures is None or view.failures.revision != revision:
        return view
    return replace(view, failures=None, overcome=view.failures, overcome_at=now)


def forgiven(view: DeploymentView) -> DeploymentView:
    """Somebody changed the deployment: begin to count anew."""
    return replace(view, failures=None, overcome=None)


def _overcome(view: DeploymentView, ready_at: float | None, now: float, policy: Policy) -> Failures | None:
    """The failures before the last success, if that was too short to end them."""
    lasted = ready_at is not None and now >= ready_at + policy.stable_after_s
    return None if lasted or now >= view.overcome_at + policy.stable_after_s else view.overcome


def refusal(view: DeploymentView, now: float) -> EngineFailed | None:
    """The error for requests while starts are given up, or None while it is worth holding them."""
    failures = view.failures
    if failures is None or not failures.given_up or now >= failures.retry_at:
        return None
    return EngineFailed(
        f"{view.name}: {failures.error}",
        hint=f"see `sllm status` and the logs of {', '.join(sorted(failures.nodes))}; deploy again to retry at once",
        retry_after_s=failures.retry_at - now,
    )


def damage(view: DeploymentView, nodes: Iterable[NodeView]) -> EngineFailed | None:
    """The error for requests while every copy of the checkpoint that is left is damaged; None if there is a good one,
    or none at all: it may be on a node that is still to come."""
    digest = view.current.deployment.digest
    living = [node for node in nodes if node.state is not NodeState.DEAD]
    copies = [(n.report.name, r.state) for n in living for r in n.report.residencies if r.digest == digest]
    if not copies or any(state is not ResidencyState.QUARANTINED for _, state in copies):
        return None
    where = ", ".join(sorted({name for name, _ in copies}))
    return EngineFailed(
        f"{view.name}: every copy of checkpoint {view.current.deployment.spec.checkpoint!r} is damaged, on {where}",
        hint="add it again: sllm checkpoint add",
    )
