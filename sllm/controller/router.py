"""Router: requests that are held, first come first served, and which ready replica each is granted. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sllm.core.ids import DeploymentName, ReplicaId
from sllm.core.request import RequestRow
from sllm.core.route import RouteTarget
from sllm.core.snapshot import Held
from sllm.errors import QueueFull

RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """A held request. `ticket` names this attempt of it to be granted a replica."""

    ticket: int
    row: RequestRow
    gateway: str
    since: float
    deadline: float

    @property
    def deployment(self) -> DeploymentName:
        return self.row.deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    waiter: Waiter
    target: RouteTarget


class Router:
    """One bounded queue per deployment; of each gateway's requests, only so many over all of them."""

    def __init__(self, *, per_deployment: int, per_gateway: int) -> None:
        self._per_deployment = per_deployment
        self._per_gateway = per_gateway
        self._of_gateway: Counter[str] = Counter()
        self._waiters: dict[int, Waiter] = {}
        self._queues: dict[DeploymentName, dict[int, Waiter]] = {}

    def add(self, waiter: Waiter) -> None:
        """Put a request at the end of its queue. Raises QueueFull."""
        waiting = len(self._queues.get(waiter.deployment, ()))
        if waiting >= self._per_deployment:
            raise QueueFull(
                f"{waiter.deployment}: {waiting} requests are waiting already",
                hint="try again later, or raise the deployment's max replicas",
                retry_after_s=RETRY_AFTER_S,
            )
        if self._of_gateway[waiter.gateway] >= self._per_gateway:
            raise QueueFull(
                f"{self._per_gateway} requests of gateway {waiter.gateway!r} are waiting already",
                hint="try again later, or at another gateway",
                retry_after_s=RETRY_AFTER_S,
            )
        self._queues.setdefault(waiter.deployment, {})[waiter.ticket] = waiter
        self._waiters[waiter.ticket] = waiter
        self._of_gateway[waiter.gateway] += 1

    def remove(self, ticket: int) -> Waiter | None:
        """Take a request out, wherever it stands; None if it is not held (any more)."""
        waiter = self._waiters.pop(ticket, None)
        if waiter:
            queue = self._queues[waiter.deployment]
            del queue[ticket]
            if not queue:
                del self._queues[waiter.deployment]
            self._of_gateway[waiter.gateway] -= 1
            if not self._of_gateway[waiter.gateway]:
                del self._of_gateway[waiter.gateway]
        return waiter

    def expire(self, now: float) -> list[Waiter]:
        """Take out those whose time is over."""
        over = [waiter for waiter in self._waiters.values() if now >= waiter.deadline]
        for waiter in over:
            self.remove(waiter.ticket)
        return over

    def next_deadline(self) -> float | None:
        return min((waiter.deadline for waiter in self._waiters.values()), default=None)

    def empty(self, deployment: DeploymentName) -> list[Waiter]:
        """Take out all that wait for a deployment."""
        waiters = list(self._queues.get(deployment, {}).values())
        for waiter in waiters:
            self.remove(waiter.ticket)
        return waiters

    def waiting(self, deployment: DeploymentName) -> list[Waiter]:
        """Those who wait for a deployment, the first first."""
        return list(self._queues.get(deployment, {}).values())

    def rows(self) -> Iterator[RequestRow]:
        """What is known of each that waits."""
        return (waiter.row for waiter in self._waiters.values())

    def held(self) -> dict[DeploymentName, Held]:
        """What is held, per deployment that has anything held."""
        return {
            name: Held(count=len(queue), since=next(iter(queue.values())).since) for name, queue in self._queues.items()
        }

    def grant(
        self, deployment: DeploymentName, targets: Sequence[RouteTarget], loads: Mapping[ReplicaId, int]
    ) -> list[Grant]:
        """Give the waiting, in order, the least loaded replicas that have room; the newest revision first."""
        load = {target.replica: loads.get(target.replica, 0) for target in targets}
        grants: list[Grant] = []
        for waiter in self.waiting(deployment):
            room = [target for target in targets if load[target.replica] < target.capacity]
            if not room:
                break
            best = min(room, key=lambda t: (-t.revision, load[t.replica] / t.capacity, t.replica))
            load[best.replica] += 1
            self.remove(waiter.ticket)
            grants.append(Grant(waiter=waiter, target=best))
        return grants
