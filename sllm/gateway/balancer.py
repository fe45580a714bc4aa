"""Which replica a request goes to (pure): one with room, of the newest revision, the least loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from sllm.core.ids import ReplicaId
from sllm.core.route import Route, RouteTarget


def choose(
    targets: Iterable[RouteTarget],
    load: Mapping[ReplicaId, int],
    *,
    accepts: Callable[[int], bool],
    avoid: Collection[ReplicaId] = (),
) -> RouteTarget | None:
    """Return the target to send to, or None if none has room.

    `load` counts the requests of this gateway per replica; `accepts` says of a revision whether the request, as it was
    tokenised, may go to it; `avoid` holds replicas that failed this request before.
    """
    fitting = [
        target
        for target in targets
        if load.get(target.replica, 0) < target.capacity and accepts(target.revision) and target.replica not in avoid
    ]
    return min(fitting, key=lambda target: _order(target, load), default=None)


def _order(target: RouteTarget, load: Mapping[ReplicaId, int]) -> tuple[int, float, str]:
    return -target.revision, load.get(target.replica, 0) / target.capacity, target.replica


def is_stranded(route: Route, accepts: Callable[[int], bool]) -> bool:
    """True if nothing will serve a request as it was tokenised: others serve, and its own revision was replaced."""
    revisions = {route.deployment.revision, *(target.revision for target in route.targets)}
    return bool(route.targets) and not any(accepts(revision) for revision in revisions)
