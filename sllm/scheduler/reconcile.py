"""From what is to what is wanted: the plan for one snapshot. An unchanged world gives an empty plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from sllm.core.decision import Candidate
from sllm.core.ids import DeploymentName, ReplicaId
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState
from sllm.core.snapshot import Command, DeploymentView, Intent, ReplicaView, Snapshot
from sllm.scheduler.autoscale import Scale, scale
from sllm.scheduler.covering import Way
from sllm.scheduler.displacement import RELEASE_S, Givers, Relief, Reliever
from sllm.scheduler.estimate import in_words
from sllm.scheduler.placement import Placement, Waiting, place, refusals
from sllm.scheduler.plan import (
    Action,
    DrainReplica,
    KeepReplica,
    MoveRequests,
    Plan,
    RaisePriority,
    Reason,
    RemoveDeployment,
    StartReplica,
    StopReplica,
)
from sllm.scheduler.refuge import Refuge
from sllm.scheduler.room import Room
from sllm.scheduler.swapping import yields_at


def reconcile(snapshot: Snapshot, now: float) -> Plan:
    """Return what to do now. The same snapshot gives the same plan.

    Of a snapshot that says what is `due`, only those deployments are looked at (`sllm.scheduler.agenda` keeps account).
    """
    planner = _Planner(snapshot, now)
    planner.commands()
    for view in _by_urgency(snapshot):
        planner.look_at(view)
    planner.stays()
    return planner.plan()


def _by_urgency(snapshot: Snapshot) -> list[DeploymentView]:
    """Who has waited longest comes first to the free devices; then by name."""
    known, due = snapshot.deployments, snapshot.due
    views = known.values() if due is None else [view for name in due if (view := known.get(name)) is not None]

    def key(view: DeploymentView) -> tuple[bool, float, str]:
        held = snapshot.held.get(view.name)
        return (held is None, held.since if held else 0.0, view.name)

    return sorted(views, key=key)


class _Planner:
    """Gathers the actions, and the room that is left after them."""

    def __init__(self, snapshot: Snapshot, now: float) -> None:
        self._snapshot = snapshot
        self._now = now
        self._room = Room(snapshot)
        self._index = self._room.index
        self._reliever = Reliever(snapshot, self._room, now)
        self._actions: list[Action] = []
        self._reasons: dict[DeploymentName, Reason] = {}
        self._wakes: list[float] = []
        self._wakes_of: dict[DeploymentName, float] = {}
        self._ended: set[ReplicaId] = set()

    def plan(self) -> Plan:
        wake_at = min(self._wakes, default=None)
        return Plan(actions=tuple(self._actions), reasons=self._reasons, wake_at=wake_at, wakes=self._wakes_of)

    def commands(self) -> None:
        """Give commands that were not accepted again, and clean up after failures."""
        astray = self._index.astray
        for replica in sorted(astray.values(), key=lambda r: (r.spec.generation, r.spec.id)) if astray else ():
            if replica.intent is not Intent.RUN:
                self._repeat(replica)
            elif replica.state is ReplicaState.FAILED:
                self._stop(replica, "it failed")
            elif replica.spec.deployment not in self._snapshot.deployments:
                self._end(replica, "its deployment is gone")
            elif replica.leaving:
                self._leave(replica)

    def look_at(self, view: DeploymentView) -> None:
        """Plan for one deployment, and note when to look at it again."""
        before = len(self._wakes)
        self.deployment(view)
        if len(self._wakes) > before:
            self._wakes_of[view.name] = min(self._wakes[before:])

    def deployment(self, view: DeploymentView) -> None:
        replicas = self._index.of_deployment.get(view.name, ())
        if view.current.deployment.deleting:
            self._delete(view, replicas)
            return
        live = [r for r in replicas if r.live]
        current = [r for r in live if r.spec.revision == view.current.number]
        outdated = [r for r in live if r.spec.revision != view.current.number]
        wanted = scale(view, self._snapshot, len(current), self._now)
        if wanted.until is not None and len(current) > wanted.needed:
            self._wakes.append(wanted.until)
        self._raise_awaited(view, current)
        let_go = self._start_missing(view, current, outdated, wanted)
        self._retire_outdated(view, current, [r for r in outdated if r not in let_go], wanted)
        self._retire_surplus(current, wanted)

    # -- starting

    def _start_missing(
        self,
        view: DeploymentView,
        current: Sequence[ReplicaView],
        outdated: Sequence[ReplicaView],
        wanted: Scale,
    ) -> list[ReplicaView]:
        """Start what is missing; return outdated replicas that were let go to make room for it."""
        missing = min(wanted.needed - len(current), self._allowed_starts(view, current, wanted))
        awaited = self._awaited_starts(view) - sum(r.starting for r in current)
        outdated = [r for r in _idlest_first(self._snapshot, outdated) if r.spec.id not in self._ended]
        let_go: list[ReplicaView] = []
        for number in range(missing):
            priority = Priority.REQUEST if number < awaited else Priority.PREWARM
            placement = place(self._room, view, priority=priority)
            held = number < awaited and self._snapshot.loads_fresh
            givers = Givers(outdated=outdated, spare=partial(self._spare_elsewhere, view), held=held)
            if isinstance(placement, Waiting):
                detail = refusals(placement.candidates, placement.holders)
                self._reasons[view.name] = Reason(text=placement.text, detail=detail)
            relief = self._reliever.relief(view, placement, givers, priority)
            if relief is not None:
                let_go += self._relieve(view, relief, priority, placement)
            elif isinstance(placement, Waiting):
                break
            else:
                self._start(view, placement, priority)
        return let_go

    def _awaited_starts(self, view: DeploymentView) -> int:
        """Return for how many starts the held requests wait; starts beyond them are ahead of requests."""
        held = self._snapshot.held.get(view.name)
        return -(-held.count // view.current.deployment.spec.target_concurrency) if held else 0

    def _raise_awaited(self, view: DeploymentView, current: Sequence[ReplicaView]) -> None:
        """Let starts go on at the priority of the requests that have come to wait for them, the oldest first.

        One that no report has shown yet may not have been accepted: it is raised when it has been.
        """
        starting = sorted((r for r in current if r.starting), key=lambda r: r.priority)
        for replica in starting[: self._awaited_starts(view)]:
            if replica.priority is Priority.REQUEST or replica.status is None:
                continue
            if self._now < replica.retry_at:
                self._wakes.append(replica.retry_at)
            else:
                why = "a request waits for it"
                self._actions.append(RaisePriority(replica=replica.spec.id, priority=Priority.REQUEST, why=why))

    def _allowed_starts(self, view: DeploymentView, current: Sequence[ReplicaView], wanted: Scale) -> int:
        if wanted.needed <= len(current):
            return 0
        if not self._snapshot.settled:
            text = "waiting for the nodes to report after a restart of the controller"
            self._reasons[view.name] = Reason(text=text)
            return 0
        failures = view.failures
        if failures is None:
            return wanted.needed
        if self._now < failures.retry_at:
            self._wakes.append(failures.retry_at)
            self._reasons[view.name] = Reason(text=f"the last start failed: {failures.error}")
            return 0
        # After a failure one is tried at a time.
        return 1 - sum(r.starting for r in current)

    def _start(self, view: DeploymentView, placement: Placement, priority: Priority) -> None:
        self._room.start(placement.node, placement.devices, view.current.deployment.digest, priority)
        why = f"{in_words(placement.estimate)}; the checkpoint is in {placement.tier.name}"
        self._actions.append(
            StartReplica(
                deployment=view.name,
                node=placement.node,
                devices=placement.devices,
                priority=priority,
                why=why,
                estimate=placement.estimate,
                candidates=placement.candidates,
                holders=placement.holders,
            )
        )

    def _relieve(
        self, view: DeploymentView, relief: Relief, priority: Priority, placement: Placement | Waiting
    ) -> list[ReplicaView]:
        """Let replicas give way, so that a start can follow. Return those that are let go."""
        devices, digest = relief.devices, view.current.deployment.digest
        self._room.claim(relief.node, devices, digest, priority)
        self._reliever.took(relief)
        detail, candidates = f"{relief.node}: {relief.text}", relief.candidates(placement)
        self._reasons[view.name] = Reason(text=_waiting_for(relief), detail=detail, candidates=candidates)
        for give in relief.cover.gives:
            if give.way is Way.STOP:
                why = f"makes room for {view.name}, revision {view.current.number}"
                self._end(give.replica, why, room_for=view.name)
            elif give.way is Way.MOVE and give.refuge is not None:
                self._move(view, relief, give.replica, give.refuge)
        return [give.replica for give in relief.cover.gives if give.way is Way.STOP]

    def _move(self, view: DeploymentView, relief: Relief, replica: ReplicaView, refuge: Refuge) -> None:
        """What runs on a replica goes on elsewhere: at others of its deployment, or at one that is started for it."""
        self._ended.add(replica.spec.id)
        if refuge.start is not None:
            start = refuge.start
            why = f"what runs on {replica.spec.id} goes on there: {view.name} needs its devices"
            self._room.start(start.node, start.devices, start.view.current.deployment.digest, Priority.REQUEST)
            self._actions.append(
                StartReplica(
                    deployment=start.view.name,
                    node=start.node,
                    devices=start.devices,
                    priority=Priority.REQUEST,
                    why=why,
                    estimate=start.estimate,
                    candidates=(Candidate(node=start.node, refused="", estimate=start.estimate),),
                    holders=1,
                )
            )
        self._actions.append(
            MoveRequests(
                replica=replica.spec.id,
                room_for=view.name,
                to=refuge.nodes,
                free_s=refuge.empty_s + RELEASE_S,
                why=f"{view.name} is ready soonest on {relief.node}, in {relief.text}",
            )
        )

    def stays(self) -> None:
        """Replicas that are emptied for nobody any more stay."""
        for replica in self._index.astray.values():
            name = replica.spec.id
            if replica.displaced and name not in self._reliever.taken and name not in self._ended:
                why = f"{replica.room_for} does not wait for its devices any more"
                self._actions.append(KeepReplica(replica=name, why=why))

    def _spare_elsewhere(self, view: DeploymentView, there: Iterable[ReplicaView]) -> list[ReplicaView]:
        """Idle replicas that other deployments keep but do not need, the longest unneeded first (LRU, paper §3); of the
        deployments that have a replica `there`, where they could make room."""
        if view.name not in self._snapshot.held or not self._snapshot.loads_fresh:
            return []
        found: list[tuple[float, str, ReplicaView]] = []
        loads = self._snapshot.loads
        for name in sorted({r.spec.deployment for r in there if r.ready and not loads.get(r.spec.id)}):
            other = self._snapshot.deployments.get(name)
            if other is None or other.name == view.name or other.name in self._snapshot.held:
                continue
            if self._reliever.is_moving(other.name):
                continue
            live = [r for r in self._index.of_deployment.get(name, ()) if r.live and r.spec.id not in self._ended]
            needed = max(other.needed, other.current.deployment.spec.min_replicas)
            spared = self._snapshot.pinned
            idle = [r for r in live if r.ready and not self._snapshot.loads.get(r.spec.id) and r.spec.id not in spared]
            idle = [r for r in idle if self._yields(r, other, view, last=len(live) == 1)]
            unneeded_since = max(other.needed_at[needed:], default=0.0)
            spare = _idlest_first(self._snapshot, idle)[: max(0, len(live) - needed)]
            found.extend((unneeded_since, replica.spec.id, replica) for replica in spare)
        return [replica for _, _, replica in sorted(found, key=lambda entry: entry[:2])]

    def _yields(self, replica: ReplicaView, owner: DeploymentView, newcomer: DeploymentView, *, last: bool) -> bool:
        """True if it may make room by now; else that is looked at again when it may."""
        at = yields_at(self._snapshot, replica, owner, newcomer, last=last)
        if self._now < at:
            self._wakes.append(at)
            why = f"{replica.spec.id} of {owner.name} stays loaded for {at - self._now:.1f} s, or until more wait"
            self._reasons[newcomer.name] = Reason(text="waiting for a free device", detail=why)
        return self._now >= at

    # -- ending

    def _delete(self, view: DeploymentView, replicas: Sequence[ReplicaView]) -> None:
        for replica in replicas:
            if replica.live or replica.displaced:
                self._end(replica, "the deployment is deleted")
        # While nodes may yet report what they run, none is no proof that none is left.
        if not replicas and self._snapshot.settled:
            self._actions.append(RemoveDeployment(deployment=view.name))

    def _retire_outdated(
        self, view: DeploymentView, current: Sequence[ReplicaView], outdated: Sequence[ReplicaView], wanted: Scale
    ) -> None:
        """Old replicas that serve stay until new ones do."""
        serving = _idlest_first(self._snapshot, [r for r in outdated if r.ready])
        ready = sum(r.ready for r in current)
        keep = max(0, wanted.kept - ready) if wanted.needed else 0
        for replica in serving[: max(0, len(serving) - keep)]:
            self._end(replica, f"replaced by revision {view.current.number}")
        for replica in outdated:
            if not replica.ready:
                self._end(replica, f"revision {view.current.number} replaces it before it began to serve")

    def _retire_surplus(self, current: Sequence[ReplicaView], wanted: Scale) -> None:
        """Only ready replicas go, and not for the sake of ones that are still starting."""
        staying = [r for r in current if r.ready and r.spec.id not in self._ended]
        ready = _idlest_first(self._snapshot, staying)
        free = [r for r in ready if r.spec.id not in self._snapshot.pinned]
        for replica in free[: max(0, len(ready) - wanted.kept)]:
            self._end(replica, "not needed any more")

    def _leave(self, replica: ReplicaView) -> None:
        """Its node drains, or others need its devices: it ends once nothing runs on it, however long that takes."""
        status, room_for = replica.status, replica.room_for
        leaves = f"{room_for} needs its devices" if room_for else "its node drains"
        if status is None or not replica.serves:
            self._ended.add(replica.spec.id)
            self._stop(replica, leaves, room_for=room_for)
        elif not (status.running or status.waiting or self._snapshot.loads.get(replica.spec.id)):
            self._ended.add(replica.spec.id)
            why = f"nothing runs on it, and {leaves}"
            self._actions.append(DrainReplica(replica=replica.spec.id, why=why, room_for=room_for))

    def _end(self, replica: ReplicaView, why: str, *, room_for: DeploymentName | None = None) -> None:
        if replica.spec.id in self._ended:
            return  # it makes room for another deployment already
        self._ended.add(replica.spec.id)
        if replica.ready:
            self._actions.append(DrainReplica(replica=replica.spec.id, why=why, room_for=room_for))
        else:
            self._stop(replica, why, room_for=room_for)

    def _stop(self, replica: ReplicaView, why: str, *, room_for: DeploymentName | None = None) -> None:
        self._actions.append(StopReplica(replica=replica.spec.id, why=why, room_for=room_for))

    def _repeat(self, replica: ReplicaView) -> None:
        if replica.command is not Command.DUE:
            return
        if self._now < replica.retry_at:
            self._wakes.append(replica.retry_at)
        elif replica.intent is Intent.DRAIN:
            self._actions.append(DrainReplica(replica=replica.spec.id, why="its end is decided"))
        else:
            self._stop(replica, "its end is decided")


def _waiting_for(relief: Relief) -> str:
    """For who sends requests: it names nobody."""
    if relief.cover.way is Way.MOVE or any(give.replica.displaced for give in relief.cover.gives):
        return "waiting for devices: what runs there is moved"
    return "waiting for a free device"


def _idlest_first(snapshot: Snapshot, replicas: Sequence[ReplicaView]) -> list[ReplicaView]:
    return sorted(replicas, key=lambda r: (snapshot.loads.get(r.spec.id, 0), -r.spec.generation, r.spec.id))
