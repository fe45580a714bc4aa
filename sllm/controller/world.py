"""World: all that the writer owns, and how it comes back from the store."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sllm.controller import moves, records
from sllm.controller.clock import Clock
from sllm.controller.decisions import Decisions
from sllm.controller.executor import Executor
from sllm.controller.flights import Flights
from sllm.controller.forecast import Forecast
from sllm.controller.jobs import Job, Jobs
from sllm.controller.latest import Latest
from sllm.controller.loads import OVERDUE_S, Loads
from sllm.controller.recording import Recorder
from sllm.controller.router import Router
from sllm.controller.store.base import Compare, Item, Op, StateStore
from sllm.controller.tickets import Ticket
from sllm.controller.waits import Waits
from sllm.core.cluster import ClusterState
from sllm.core.ids import DeploymentName, NodeName, RequestId
from sllm.core.request import RequestRow
from sllm.core.route import RouteTable
from sllm.core.snapshot import Policy, Snapshot
from sllm.errors import Conflict, SllmError
from sllm.scheduler.agenda import Agenda
from sllm.scheduler.estimator import Estimator
from sllm.scheduler.plan import Reason
from sllm.scheduler.residency_plan import Recent


class World:
    """Changed by the writer only; read by anyone in its thread, between awaits."""

    def __init__(
        self,
        *,
        store: StateStore,
        clock: Clock,
        policy: Policy,
        router: Router,
        epoch: int,
        executor: Executor,
        recorder: Recorder,
    ) -> None:
        self.store = store
        self.clock = clock
        self.policy = policy
        self.executor = executor
        self.recorder = recorder
        self.cluster = ClusterState(policy)
        self.router = router
        self.loads = Loads()
        self.jobs = Jobs()
        self.flights = Flights()
        self.forecast = Forecast()
        self.estimator = Estimator()
        self.decisions = Decisions()
        self.waits = Waits()
        self.recent = Recent()
        # Where checkpoints are to lie is decided again at the first pass after this; a pass before it waits for it.
        self.prepare_at = clock.monotonic()
        self.prepare_due = False
        self.tickets: dict[int, Ticket] = {}
        self.table = Latest(RouteTable(epoch=epoch, revision=0))
        self.agenda = Agenda()
        self.planned_from: Snapshot | None = None
        # Deployments with requests that began and ended between two reports.
        self.touched: set[DeploymentName] = set()
        self.generation = 0
        # Why the last commit failed.
        self.not_stored: SllmError | None = None
        # Something happened since the last plan that may call for another.
        self.changed = True
        # Nodes known before a restart: until they have reported, or had the time to, what they run is not known.
        self.awaited: set[NodeName] = set()
        self.settle_at = clock.monotonic() + policy.suspect_s
        # By then every gateway has reported: what none of them has named is over.
        self.complete_at = clock.monotonic() + OVERDUE_S

    @property
    def reasons(self) -> Mapping[DeploymentName, Reason]:
        """What deployments wait for that do not have what they need."""
        return self.agenda.reasons

    def settled(self, now: float) -> bool:
        return not self.awaited or now >= self.settle_at

    def rows(self) -> dict[RequestId, RequestRow]:
        """Open requests: what gateways report every second, and what we know before they do."""
        return {row.id: row for row in itertools.chain(self.loads.rows(), self.router.rows())}

    def snapshot(self, now: float) -> Snapshot:
        snapshot = self.cluster.snapshot(
            loads=self.loads.per_replica(),
            held=self.router.held(),
            settled=self.settled(now),
            loads_fresh=self.loads.fresh(now),
            learnt=self.estimator.learnt(now),
        )
        moving = self.jobs.moving()
        return replace(snapshot, pinned=moves.ends_of(moving, snapshot, self.rows())) if moving else snapshot

    def compared(self, now: float) -> Snapshot:
        """A snapshot; what it has that the last plan did not see is on the agenda."""
        snapshot = self.snapshot(now)
        self.agenda.noted(self.cluster.touched())
        self.agenda.compare(self.planned_from, snapshot)
        return snapshot

    async def commit(self, ops: Sequence[Op]) -> None:
        """Store changes. If that fails, the writer ends: what it would say from then on might not be stored."""
        try:
            await self._store(ops)
        except SllmError as error:
            self.not_stored = error
            raise

    async def commit_job(self, ops: Sequence[Op], job: Job) -> None:
        """Store a job with what else changes by it, and forget the oldest of those that have ended."""
        excess = self.jobs.excess()
        await self.commit([*ops, records.put_job(job), *(records.delete_job(old) for old in excess)])
        for old in excess:
            self.jobs.drop(old)
        self.jobs.put(job)

    async def _store(self, ops: Sequence[Op]) -> None:
        """The epoch fences: once another controller has opened this store, nothing is written."""
        item = await self.store.get(records.EPOCH)
        ours = item is not None and records.number(item.value) == self.executor.epoch
        mod_rev = item.mod_rev if item else 0
        result = await self.store.txn([Compare(key=records.EPOCH, mod_rev=mod_rev)], ops) if ours else None
        if result is None or not result.succeeded:
            raise Conflict("another controller has taken over this state", hint="stop one of the two")

    async def restore(self) -> None:
        """Read back what was wanted."""
        generation = await self.store.get(records.GENERATION)
        self.generation = records.number(generation.value) if generation else 0
        for item in await self._items(records.DEPLOYMENTS):
            view = records.read_deployment(item.value)
            self.cluster.deployments[view.name] = view
        for item in await self._items(records.OPERATIONS):
            self.jobs.put(records.read_job(item.value))
        for item in await self._items(records.NODES):
            name = NodeName(item.key.removeprefix(records.NODES))
            self.awaited.add(name)
            cordon = records.read_cordon(item.value)
            self.cluster.close(name, replace(cordon, draining=self.jobs.drain_of(name) is not None))

    async def _items(self, prefix: str) -> tuple[Item, ...]:
        return (await self.store.range(prefix))[0]


async def next_epoch(store: StateStore) -> int:
    """Take over the store: every controller that opens it gets a higher epoch than any before."""
    item = await store.get(records.EPOCH)
    epoch = records.number(item.value) + 1 if item else 1
    mod_rev = item.mod_rev if item else 0
    result = await store.txn([Compare(key=records.EPOCH, mod_rev=mod_rev)], [records.put_number(records.EPOCH, epoch)])
    if not result.succeeded:
        raise Conflict("another controller opened this state at the same time", hint="start one controller only")
    return epoch
