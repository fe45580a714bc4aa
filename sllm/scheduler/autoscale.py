"""How many replicas a deployment needs, and how many it keeps.

Up at once: as many as the running and held requests need. Down only after `keep_alive_s` without needing them, and
never while a gateway's report is overdue: a silent gateway may be busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sllm.core.snapshot import DeploymentView, Intent, ReplicaView, Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Start replicas up to `needed`; drain those above `kept`, which falls at `until` if nothing happens."""

    needed: int
    kept: int
    until: float | None = None


def demand(snapshot: Snapshot, view: DeploymentView, replicas: Sequence[ReplicaView]) -> int:
    """Replicas that the requests of this moment need, not yet bounded.

    What runs on a replica that was scaled away does not call for another; what runs on one that is being replaced does.
    """
    spec = view.current.deployment.spec
    held = snapshot.held.get(spec.name)
    requests = held.count if held else 0
    for replica in replicas:
        if replica.intent is Intent.RUN or replica.spec.revision != view.current.number:
            requests += snapshot.loads.get(replica.spec.id, 0)
    return -(-requests // spec.target_concurrency)


def remember(view: DeploymentView, replicas_needed: int, now: float) -> DeploymentView:
    """Note what is needed now, within the deployment's bounds; what was needed until now was so until now."""
    spec = view.current.deployment.spec
    needed = min(max(replicas_needed, spec.min_replicas), spec.max_replicas)
    level = max(needed, view.needed)
    if level == 0:
        return view
    return replace(view, needed=needed, needed_at=(now,) * level + view.needed_at[level:])


def kept_warm(view: DeploymentView, replicas: int, now: float) -> DeploymentView:
    """Begin the keep-alive of so many replicas now, whether they were needed or not."""
    return replace(view, needed_at=(now,) * replicas + view.needed_at[replicas:])


def cut(view: DeploymentView, replicas: int) -> DeploymentView:
    """Forget that more than so many replicas were ever needed."""
    return replace(view, needed=min(view.needed, replicas), needed_at=view.needed_at[:replicas])


def scale(view: DeploymentView, snapshot: Snapshot, existing: int, now: float) -> Scale:
    """`existing` counts live replicas of the current revision."""
    spec = view.current.deployment.spec
    # One that is deleted needs nothing any more.
    if view.current.deployment.deleting:
        return Scale(needed=0, kept=0)
    needed = min(max(view.needed, spec.min_replicas), spec.max_replicas)
    if not snapshot.loads_fresh:
        return Scale(needed=needed, kept=min(max(needed, existing), spec.max_replicas))
    ends = [at + spec.keep_alive_s for at in view.needed_at]
    kept = min(max(needed, sum(now < end for end in ends)), spec.max_replicas)
    return Scale(needed=needed, kept=kept, until=min((end for end in ends[needed:] if now < end), default=None))


def surplus(
    snapshot: Snapshot, view: DeploymentView, replicas: Sequence[ReplicaView], wanted: int | None
) -> list[ReplicaView]:
    """The live replicas beyond `wanted`, in the order in which to let them go: starting ones, then the idlest.

    As many as held requests need are left to them. None: no number is asked for, and none is beyond it.
    """
    if wanted is None:
        return []
    spec = view.current.deployment.spec
    held = snapshot.held.get(spec.name)
    keep = max(wanted, -(-held.count // spec.target_concurrency) if held else 0)
    live = sorted(
        (r for r in replicas if r.live),
        key=lambda r: (r.ready, snapshot.loads.get(r.spec.id, 0), -r.spec.generation),
    )
    return live[: max(0, len(live) - keep)]
