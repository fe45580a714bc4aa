"""Displacement: how requests that wait get devices which are not free, and whether that is better than what is (paper
§5.1, docs/scheduling.md). Pure.

On each node that holds the checkpoint replicas may give their devices: those that leave already, idle ones that nobody
needs, busy ones that are expected to end, busy ones whose requests move elsewhere. Which of them is a covering dynamic
program (`covering`); what it is compared with is a start on free devices (`placement`), and waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from sllm.core.decision import Candidate
from sllm.core.device import Device, DeviceState
from sllm.core.ids import DeploymentName, DeviceId, NodeName, ReplicaId
from sllm.core.node import NodeState
from sllm.core.priority import Priority
from sllm.core.snapshot import DeploymentView, Intent, NodeView, ReplicaView, Snapshot
from sllm.core.startup import Estimate
from sllm.scheduler.covering import Cover, Give, Way, covers
from sllm.scheduler.placement import Placement, Waiting, avoided, device_bytes, near, startup, usable
from sllm.scheduler.refuge import Refuge, Reserved, refuge
from sllm.scheduler.room import Room

RELEASE_S = 0.1  # from the end of a replica's last request until its devices are free
# What disturbs more must gain this much over what disturbs less: predictions are wrong, and moves cost more than their
# pauses.
GAIN = 0.2
GAIN_S = 0.25
MOVES_PER_NODE = 2  # replicas that are emptied on one node at a time
MOST_MOVES = 3  # of one request
SPARED_S = 10.0  # one whose displacement was given up is left alone for so long
LOOKED_AT = 128  # nodes that hold the checkpoint: of more, no more than these are asked to give devices
SETTLED_S = 1.0  # a replica that has only just become ready is not moved on


@dataclass(frozen=True, slots=True, kw_only=True)
class Relief:
    """A start on `node` once `cover`'s replicas have given their devices: all of `devices` are then free. `promised`:
    it was decided before, and goes on."""

    node: NodeName
    devices: tuple[DeviceId, ...]
    estimate: Estimate
    cover: Cover
    reads: bool
    count: int
    promised: bool = False
    others: tuple[Relief, ...] = ()

    @property
    def total_s(self) -> float:
        """What clients wait for it: those that are held, and those whose requests move."""
        return self.cover.cost_s + self.estimate.total_s

    def candidates(self, placement: Placement | Waiting) -> tuple[Candidate, ...]:
        """The nodes that were looked at, those with free devices too; of each the best that was not taken."""
        found = {c.node: replace(c, refused=c.refused or f"{self.node} is sooner") for c in placement.candidates}
        for other in sorted(self.others, key=lambda o: (-o.total_s, o.node)):
            found[other.node] = Candidate(node=other.node, refused=other.text, estimate=other.estimate)
        found[self.node] = Candidate(node=self.node, refused="", estimate=self.estimate)
        return tuple(found[node] for node in sorted(found))

    @property
    def order(self) -> tuple[Way, tuple[int, ...], bool, int, NodeName]:
        """Among reliefs that are as good as each other the least is taken."""
        ranks = tuple(sorted(give.rank for give in self.cover.gives))
        return (self.cover.way, ranks, self.reads, self.count, self.node)

    @property
    def text(self) -> str:
        """For example `1.95 s: rep-1 is idle, rep-2 moves to node-2; its devices are free in 1.20 s`."""
        gives = ", ".join(map(_in_words, self.cover.gives))
        return f"{self.total_s:.2f} s: {gives}; devices are free in {self.cover.free_s:.2f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Givers:
    """Who may give way: `outdated` replicas of the deployment's own, and if requests wait for it (`held`) also `spare`
    ones of others, the first to go first, and busy ones."""

    outdated: Sequence[ReplicaView]
    spare: Callable[[Iterable[ReplicaView]], Sequence[ReplicaView]]
    held: bool


class Reliever:
    """For one pass of the planner. `taken` replicas give way already, or have been waited for."""

    def __init__(self, snapshot: Snapshot, room: Room, now: float) -> None:
        self.taken: set[ReplicaId] = set()
        self._snapshot = snapshot
        self._room = room
        self._now = now
        displaced = [r for r in room.index.astray.values() if r.displaced]
        self._moving_on = Counter(replica.node for replica in displaced)
        self._moving_of = {replica.spec.deployment for replica in displaced}

    def is_moving(self, deployment: DeploymentName) -> bool:
        """True if what runs on a replica of it is on its way to others of it."""
        return deployment in self._moving_of

    def took(self, relief: Relief) -> None:
        """The planner carries it out."""
        for give in relief.cover.gives:
            self.taken.add(give.replica.spec.id)
            if give.way is Way.MOVE:
                self._moving_on[give.replica.node] += 1
                self._moving_of.add(give.replica.spec.deployment)

    def relief(
        self, view: DeploymentView, placement: Placement | Waiting, givers: Givers, priority: Priority
    ) -> Relief | None:
        """What is better than `placement`; None: nothing is."""
        found = placement if isinstance(placement, Placement) else None
        promised = self._promised(view, priority)
        if promised is not None and not (found and _surely_sooner(found, promised)):
            return promised
        if found and (not givers.held or not _can_be_beaten(found)):
            return None
        sites = self._sites(view, givers, priority, moving=False)
        best, moves = _best_calm(sites, found), []
        if givers.held:
            best = _better([site for site in sites if site.cover.way is Way.WAIT], _total(best, found)) or best
            moves = self._moves(view, givers, priority) if self._snapshot.policy.displace else []
            best = _better(moves, min(_total(best, found), self._own_room_s(view))) or best
        return replace(best, others=tuple(s for s in (*sites, *moves) if s is not best)) if best else None

    # -- what was decided before

    def _promised(self, view: DeploymentView, priority: Priority) -> Relief | None:
        """Replicas that give way for it already. What was decided is not decided anew at each event."""
        holders = self._room.index.holders(view.current.deployment.digest) & self._room.index.leaving
        ending = [r for entry in self._room.index.those(holders) for r in entry.replicas]
        own = [r for r in ending if r.room_for == view.name and r.spec.id not in self.taken]
        for node in sorted({replica.node for replica in own}):
            there = self._snapshot.nodes.get(node)
            if there is None or there.state is not NodeState.READY or avoided(there, view):
                continue
            gives = [self._leaving(replica, view) for replica in own if replica.node == node]
            cover = Cover()
            for give in sorted((g for g in gives if g.width), key=lambda g: (g.free_s, g.replica.spec.id)):
                if not self._missing(there, view, cover):
                    break
                cover = cover.with_one(give)
            if not self._missing(there, view, cover) and cover.gives:
                return self._site(there, view, cover, priority, promised=True)
        return None

    # -- what could be decided

    def _sites(self, view: DeploymentView, givers: Givers, priority: Priority, *, moving: bool) -> list[Relief]:
        """Per node and way the best cover."""
        index = self._room.index
        able = index.those(index.holders(view.current.deployment.digest) & index.ready)
        nodes = [entry.view for entry in islice(able, LOOKED_AT) if entry.view is not None]
        near_by = [replica for node in nodes for replica in self._there(node.report.name)]
        spare = {r.spec.id: rank for rank, r in enumerate((*givers.outdated, *givers.spare(near_by)))}
        outdated = {r.spec.id for r in givers.outdated}
        found: list[Relief] = []

        def ways(replica: ReplicaView, reserved: Reserved) -> Iterable[Give]:
            return self._ways(replica, reserved, view, spare, moving=moving, held=givers.held)

        for node in nodes:
            missing = self._missing(node, view, Cover())
            if avoided(node, view) or missing <= 0:
                continue
            there = [r for r in self._there(node.report.name) if self._may_give(r, view, outdated)]
            best: dict[Way, Cover] = {}
            for cover in covers(missing, there, ways):
                best.setdefault(cover.way, cover)
            found += [self._site(node, view, cover, priority) for cover in best.values()]
        return found

    def _moves(self, view: DeploymentView, givers: Givers, priority: Priority) -> list[Relief]:
        sites = self._sites(view, givers, priority, moving=True)
        return [site for site in sites if site.cover.way is Way.MOVE and self._within_budget(site)]

    def _within_budget(self, site: Relief) -> bool:
        moved = [give.replica for give in site.cover.gives if give.way is Way.MOVE]
        each_once = len({replica.spec.deployment for replica in moved}) == len(moved)
        return each_once and self._moving_on[site.node] + len(moved) <= MOVES_PER_NODE

    def _may_give(self, replica: ReplicaView, view: DeploymentView, outdated: set[ReplicaId]) -> bool:
        if replica.spec.id in self.taken or replica.room_for not in (None, view.name):
            return False
        return replica.spec.deployment != view.name or not replica.live or replica.spec.id in outdated

    def _ways(
        self,
        replica: ReplicaView,
        reserved: Reserved,
        view: DeploymentView,
        spare: dict[ReplicaId, int],
        *,
        moving: bool,
        held: bool,
    ) -> Iterable[Give]:
        width, name = self._width(replica, view), replica.spec.id
        if not width:
            return
        if not replica.live:
            yield self._leaving(replica, view)
        elif name in spare:
            free_s = self._free_s(replica, self._snapshot.policy.drain_s)
            yield Give(replica=replica, way=Way.STOP, width=width, free_s=free_s, rank=spare[name])
        elif held and self._is_busy(replica):
            free_s = self._free_s(replica, float("inf"))
            if free_s < float("inf"):
                yield Give(replica=replica, way=Way.WAIT, width=width, free_s=free_s)
            if moving and (place := self._refuge(replica, reserved)) is not None:
                yield Give(
                    replica=replica,
                    way=Way.MOVE,
                    width=width,
                    free_s=place.empty_s + RELEASE_S,
                    pause_s=place.pause_s,
                    refuge=place,
                )

    def _leaving(self, replica: ReplicaView, view: DeploymentView) -> Give:
        bound_s = self._snapshot.policy.drain_s if replica.intent is Intent.DRAIN else float("inf")
        free_s = self._free_s(replica, bound_s)
        return Give(replica=replica, way=Way.LEAVING, width=self._width(replica, view), free_s=free_s)

    def _free_s(self, replica: ReplicaView, bound_s: float) -> float:
        """When the devices are free, if what runs there ends there, or after `bound_s`."""
        running = self._snapshot.running.get(replica.spec.id, {})
        if not replica.serves or replica.intent is Intent.STOP or not self._snapshot.loads.get(replica.spec.id):
            return RELEASE_S
        if len(running) < self._snapshot.loads[replica.spec.id]:
            return bound_s + RELEASE_S
        left = [float("inf") if o.left_s is None else o.left_s for o in running.values()]
        return min(max(left), bound_s) + RELEASE_S

    def _is_busy(self, replica: ReplicaView) -> bool:
        """Of a deployment that needs it now, and no more replicas than it has."""
        name = replica.spec.id
        others_wait = replica.spec.deployment in self._snapshot.held
        return replica.ready and not others_wait and bool(self._snapshot.loads.get(name))

    def _refuge(self, replica: ReplicaView, reserved: Reserved) -> Refuge | None:
        """A place for all that runs there; None: it has none, or is not to be moved now."""
        name, snapshot = replica.spec.id, self._snapshot
        running = snapshot.running.get(name, {})
        if len(running) < snapshot.loads.get(name, 0) or name in snapshot.pinned or not snapshot.loads_fresh:
            return None
        settled = replica.ready_at is not None and self._now >= replica.ready_at + SETTLED_S
        if not settled or self._now < replica.spared_until or replica.spec.deployment in self._moving_of:
            return None
        if any(outlook.moves >= MOST_MOVES for outlook in running.values()):
            return None
        return refuge(snapshot, self._room, replica, reserved)

    def _own_room_s(self, view: DeploymentView) -> float:
        """When the last of the held requests would have room at the deployment's own replicas, as they become free."""
        replicas = [r for r in self._room.index.of_deployment.get(view.name, ()) if r.ready]
        lefts = [o.left_s for r in replicas for o in self._snapshot.running.get(r.spec.id, {}).values()]
        known = sorted(left for left in lefts if left is not None)
        held = self._snapshot.held[view.name].count
        return known[held - 1] if held <= len(known) else float("inf")

    # -- what there is

    def _site(
        self, node: NodeView, view: DeploymentView, cover: Cover, priority: Priority, *, promised: bool = False
    ) -> Relief:
        name = node.report.name
        devices = usable(self._room, node, view)
        given = [d for give in cover.gives for d in self._given(give.replica, view)]
        estimate = startup(self._room, node, view, (*devices, *given)[0].kind, priority)
        return Relief(
            node=name,
            devices=tuple(device.id for device in (*devices, *given)),
            estimate=estimate,
            cover=cover,
            reads=estimate.size_bytes > 0,
            count=self._room.count(name),
            promised=promised,
        )

    def _missing(self, node: NodeView, view: DeploymentView, cover: Cover) -> int:
        return max(0, view.current.deployment.spec.devices - len(usable(self._room, node, view)) - cover.width)

    def _width(self, replica: ReplicaView, view: DeploymentView) -> int:
        return len(self._given(replica, view))

    def _given(self, replica: ReplicaView, view: DeploymentView) -> list[Device]:
        """Its devices that the deployment could use."""
        node = self._snapshot.nodes.get(replica.node)
        if node is None:
            return []
        return [
            device
            for device in node.report.devices
            if device.id in replica.spec.devices
            and device.id not in node.cordon.devices
            and device.state is not DeviceState.LOST
            and device.memory_bytes >= device_bytes(view)
        ]

    def _there(self, node: NodeName) -> list[ReplicaView]:
        entry = self._room.index.entries.get(node)
        return sorted(entry.replicas, key=lambda r: r.spec.id) if entry is not None else []


# -- comparing


def _can_be_beaten(placement: Placement) -> bool:
    """True if a start that waits for nothing and reads nothing would be sooner by what a relief must gain."""
    waited_s = placement.estimate.queued.seconds + placement.estimate.loading.seconds
    return not placement.estimate.guessed and waited_s > GAIN_S


def _surely_sooner(placement: Placement, promised: Relief) -> bool:
    """True if the devices that were free when the other was decided cannot have been these."""
    return placement.node == promised.node or not placement.estimate.size_bytes


def _best_calm(sites: Sequence[Relief], placement: Placement | None) -> Relief | None:
    """The best of those that only let go what nobody needs."""
    calm = [site for site in sites if site.cover.way <= Way.STOP and site.total_s < float("inf")]
    if not calm:
        return None
    if any(site.estimate.guessed for site in calm):
        # A guess is no reason to prefer a node.
        return None if placement else min(calm, key=lambda site: site.order)
    limit = near(min(site.total_s for site in calm))
    best = min((site for site in calm if site.total_s <= limit), key=lambda site: site.order)
    return best if placement is None or _gains(best.total_s, placement.estimate.total_s) else None


def _better(sites: Sequence[Relief], best_s: float) -> Relief | None:
    """The best of these, if it gains enough over what is the best so far."""
    found = min(sites, key=lambda site: (site.total_s, site.order), default=None)
    return found if found is not None and _gains(found.total_s, best_s) else None


def _total(best: Relief | None, placement: Placement | None) -> float:
    if best is not None:
        return best.total_s
    return placement.estimate.total_s if placement is not None else float("inf")


def _gains(seconds: float, over_s: float) -> bool:
    return seconds * (1 + GAIN) + GAIN_S <= over_s


def _in_words(give: Give) -> str:
    name = give.replica.spec.id
    if give.way is Way.MOVE:
        where = ", ".join(give.refuge.nodes) if give.refuge else ""
        return f"{name} moves to {where}"
    return f"{name} is being emptied" if give.replica.displaced else f"{name} {_WORDS[give.way]}"


_WORDS = {Way.LEAVING: "is leaving", Way.STOP: "makes room", Way.WAIT: "is expected to end"}
