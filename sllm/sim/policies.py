"""Policies to compare: `ours` is what the controller really does; the others stand for what schedulers do without it.

All share the autoscaling of `sllm.scheduler.autoscale` and let idle replicas make room for requests that wait; they
differ in where a replica starts, and in what gives way for it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from sllm.core.device import DeviceState
from sllm.core.ids import DeviceId, NodeName, ReplicaId
from sllm.core.node import NodeState
from sllm.core.priority import Priority
from sllm.core.residency import Tier
from sllm.core.snapshot import Command, DeploymentView, Intent, NodeView, ReplicaView, Snapshot
from sllm.scheduler.autoscale import scale
from sllm.scheduler.plan import Action, DrainReplica, Plan, StartReplica, StopReplica
from sllm.scheduler.reconcile import reconcile
from sllm.sim.controller import Decide


def ours(snapshot: Snapshot, now: float, rng: Random) -> Plan:
    """The production scheduler. It draws nothing."""
    return reconcile(snapshot, now)


def no_migration(snapshot: Snapshot, now: float, rng: Random) -> Plan:
    """The production scheduler, but nothing is moved that runs."""
    return reconcile(replace(snapshot, policy=replace(snapshot.policy, displace=False)), now)


def random(snapshot: Snapshot, now: float, rng: Random) -> Plan:
    """Start on any node with free devices; if there is none, on any where idle replicas can make room."""
    return _Greedy(snapshot, now, lambda sites: _anywhere(sites, rng)).plan()


def locality(snapshot: Snapshot, now: float, rng: Random) -> Plan:
    """Start where the checkpoint lies on the best tier, and wait for devices there if all are busy (paper §5.1)."""
    return _Greedy(snapshot, now, _nearest).plan()


def preemption(snapshot: Snapshot, now: float, rng: Random) -> Plan:
    """Start where the checkpoint lies on the best tier; if devices there are busy and others are free, stop what runs
    there: its requests lose their replica, and wait for one elsewhere (as in Shepherd, NSDI'23)."""
    return _Greedy(snapshot, now, _nearest_by_force).plan()


POLICIES: Mapping[str, Decide] = {
    "ours": ours,
    "no-migration": no_migration,
    "random": random,
    "locality": locality,
    "preemption": preemption,
}


@dataclass(frozen=True, slots=True)
class Site:
    """A node that could take a replica: its free devices, and the replicas that could make room there: `idle` ones that
    nobody needs, the longest unneeded first, and `busy` ones of other deployments, the least loaded, youngest first.
    `coming` devices will be free soon. All are large enough."""

    node: NodeName
    tier: Tier
    free: tuple[DeviceId, ...]
    coming: int
    idle: tuple[ReplicaView, ...]
    busy: tuple[ReplicaView, ...]
    wanted: int  # devices of the replica

    @property
    def open(self) -> bool:
        return len(self.free) >= self.wanted

    @property
    def reserved(self) -> bool:
        """True if enough devices will be free when what is ending has ended."""
        return len(self.free) + self.coming >= self.wanted

    def ending(self, replicas: Sequence[ReplicaView]) -> tuple[ReplicaView, ...]:
        """The first of these whose devices would be enough; none if all are too few."""
        short = self.wanted - len(self.free) - self.coming
        for count in range(1, len(replicas) + 1):
            if sum(len(replica.spec.devices) for replica in replicas[:count]) >= short:
                return tuple(replicas[:count])
        return ()


@dataclass(frozen=True, slots=True)
class Choice:
    """Start at `site`, if its devices are free; else these replicas end first."""

    site: Site
    drained: tuple[ReplicaView, ...] = ()
    stopped: tuple[ReplicaView, ...] = ()


Rule = Callable[[Sequence[Site]], Choice | None]
"""Which of the sites, none of them empty, takes a replica; None: it waits."""


def _anywhere(sites: Sequence[Site], rng: Random) -> Choice | None:
    if opened := [site for site in sites if site.open]:
        return Choice(rng.choice(opened))
    if any(site.reserved for site in sites):
        return None
    if spare := [site for site in sites if site.ending(site.idle)]:
        site = rng.choice(spare)
        return Choice(site, drained=site.ending(site.idle))
    return None


def _nearest(sites: Sequence[Site]) -> Choice | None:
    tier = max(site.tier for site in sites)
    return _roomiest([site for site in sites if site.tier is tier])


def _roomiest(sites: Sequence[Site]) -> Choice | None:
    """Among equals: free devices, else such that are coming, else idle replicas that make room."""
    opened = [site for site in sites if site.open]
    if opened:
        return Choice(min(opened, key=lambda site: (-len(site.free), site.node)))
    if any(site.reserved for site in sites):
        return None
    spare = next((site for site in sites if site.ending(site.idle)), None)
    return Choice(spare, drained=spare.ending(spare.idle)) if spare else None


def _nearest_by_force(sites: Sequence[Site]) -> Choice | None:
    tier = max(site.tier for site in sites)
    near = [site for site in sites if site.tier is tier]
    choice = _roomiest(near)
    if choice is not None or any(site.reserved for site in near):
        return choice
    far = [site for site in sites if site.tier is not tier]
    victims = next((site for site in near if site.ending(site.busy)), None)
    # Where nothing is free anywhere, who is stopped would have nowhere to go.
    if victims is not None and any(site.open for site in far):
        return Choice(victims, stopped=victims.ending(victims.busy))
    return _roomiest(far)


class _Greedy:
    """One pass: who waits longest chooses first, by the rule."""

    def __init__(self, snapshot: Snapshot, now: float, rule: Rule) -> None:
        self._snapshot = snapshot
        self._now = now
        self._rule = rule
        self._replicas = snapshot.replicas_by_deployment()
        self._taken = {(r.node, device) for r in snapshot.replicas.values() for device in r.spec.devices}
        self._actions: list[Action] = []
        self._ended: set[ReplicaId] = set()
        self._wakes: list[float] = []

    def plan(self) -> Plan:
        for replica in self._snapshot.replicas.values():
            self._repeat(replica)
        held = self._snapshot.held
        known = self._snapshot.deployments.values()
        for view in sorted(
            (view for view in known if view.needed or view.name in held or view.name in self._replicas),
            key=lambda v: (v.name not in held, held[v.name].since if v.name in held else 0.0, v.name),
        ):
            self._deployment(view)
        return Plan(actions=tuple(self._actions), wake_at=min(self._wakes, default=None))

    def _repeat(self, replica: ReplicaView) -> None:
        """Tell a node again that did not answer."""
        if replica.intent is Intent.RUN or replica.command is not Command.DUE:
            return
        if self._now < replica.retry_at:
            self._wakes.append(replica.retry_at)
        else:
            self._actions.append(StopReplica(replica=replica.spec.id, why="its end is decided"))

    def _deployment(self, view: DeploymentView) -> None:
        live = [r for r in self._replicas.get(view.name, []) if r.live and r.spec.id not in self._ended]
        wanted = scale(view, self._snapshot, len(live), self._now)
        if wanted.until is not None and len(live) > wanted.needed:
            self._wakes.append(wanted.until)
        self._start(view, wanted.needed - len(live))
        ready = sorted((r for r in live if r.ready), key=self._load)
        for replica in ready[: max(0, len(ready) - wanted.kept)]:
            self._end(replica, "not needed any more")

    def _start(self, view: DeploymentView, missing: int) -> None:
        if view.failures is not None and self._now < view.failures.retry_at:
            self._wakes.append(view.failures.retry_at)
            return
        for _ in range(missing):
            sites = self._sites(view)
            choice = self._rule(sites) if sites else None
            if choice is None:
                return
            for replica in choice.drained:
                self._end(replica, f"makes room for {view.name}")
            for replica in choice.stopped:
                self._ended.add(replica.spec.id)
                self._actions.append(StopReplica(replica=replica.spec.id, why=f"is stopped for {view.name}"))
            if choice.drained or choice.stopped:
                return
            devices = choice.site.free[: choice.site.wanted]
            self._taken.update((choice.site.node, device) for device in devices)
            self._actions.append(
                StartReplica(
                    deployment=view.name,
                    node=choice.site.node,
                    devices=devices,
                    priority=Priority.REQUEST,
                    why=f"the checkpoint is in {choice.site.tier.name}",
                )
            )

    def _end(self, replica: ReplicaView, why: str) -> None:
        self._ended.add(replica.spec.id)
        self._actions.append(DrainReplica(replica=replica.spec.id, why=why))

    # -- what there is

    def _sites(self, view: DeploymentView) -> list[Site]:
        found = [self._site(node, view) for node in self._snapshot.nodes.values()]
        return sorted((site for site in found if site is not None), key=lambda site: site.node)

    def _site(self, node: NodeView, view: DeploymentView) -> Site | None:
        """What the node has for a replica of `view`; None: it can never take one as it is."""
        tier = _tier(node, view.current.deployment.digest)
        wanted = view.current.deployment.spec.devices
        needed_bytes = view.current.size_bytes / wanted
        large = {device.id for device in node.report.devices if device.memory_bytes >= needed_bytes}
        if node.state is not NodeState.READY or tier is None or len(large) < wanted:
            return None
        name = node.report.name
        there = [r for r in self._snapshot.replicas.values() if r.node == name and large.issuperset(r.spec.devices)]
        ending = [r for r in there if not r.live or r.spec.id in self._ended]
        others = [r for r in there if r not in ending and r.ready and r.spec.deployment != view.name]
        idle = [r for r in others if self._is_spare(r)]
        return Site(
            node=name,
            tier=tier,
            free=tuple(
                device.id
                for device in node.report.devices
                if device.id in large and device.state is DeviceState.FREE and (name, device.id) not in self._taken
            ),
            coming=sum(len(replica.spec.devices) for replica in ending),
            idle=tuple(sorted(idle, key=self._unneeded_since)),
            busy=tuple(sorted((r for r in others if r not in idle), key=self._load)),
            wanted=wanted,
        )

    def _is_spare(self, replica: ReplicaView) -> bool:
        name = replica.spec.deployment
        if self._snapshot.loads.get(replica.spec.id) or name in self._snapshot.held:
            return False
        view = self._snapshot.deployments[name]
        needed = max(view.needed, view.current.deployment.spec.min_replicas)
        return sum(r.live and r.spec.id not in self._ended for r in self._replicas[name]) > needed

    def _unneeded_since(self, replica: ReplicaView) -> tuple[float, str]:
        view = self._snapshot.deployments[replica.spec.deployment]
        return (max(view.needed_at[view.needed :], default=0.0), replica.spec.id)

    def _load(self, replica: ReplicaView) -> tuple[int, int, str]:
        return (self._snapshot.loads.get(replica.spec.id, 0), -replica.spec.generation, replica.spec.id)


def _tier(node: NodeView, digest: str) -> Tier | None:
    """DRAM or SSD; None if there is no copy at rest. (What another replica has on its devices helps nobody.)"""
    if node.tier_of(digest) is None:
        return None
    return Tier.DRAM if node.in_memory(digest) else Tier.SSD
