"""ClusterState: what the controller knows of nodes, replicas and deployments, changed by what it is told.

Bookkeeping only: it takes reports and outcomes in and gives snapshots out; it decides nothing and knows no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sllm.core.ids import DeploymentName, NodeName, ReplicaId
from sllm.core.index import NO_NODES, Index, IndexKeeper, Sources
from sllm.core.node import OPEN, Cordon, NodeReport, NodeState
from sllm.core.popularity import Popularity, first_asked
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState, ReplicaStatus
from sllm.core.snapshot import Command, DeploymentView, Held, Intent, NodeView, Policy, ReplicaView, Snapshot
from sllm.core.startup import NOTHING_LEARNT, Learnt
from sllm.core.table import TrackedTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a report changed. `failed` were wanted and will not be; `gone` are no longer known at all."""

    failed: tuple[ReplicaView, ...] = ()
    ready: tuple[ReplicaView, ...] = ()
    adopted: tuple[ReplicaView, ...] = ()
    gone: tuple[ReplicaView, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """Nodes (a set of an index) and deployments that plans may see otherwise than before."""

    nodes: int = NO_NODES
    deployments: frozenset[DeploymentName] = frozenset()


_NO_CHANGES = Changes()


class ClusterState:
    """Mutable, for one writer. The mappings hold immutable values."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.nodes: TrackedTable[NodeName, NodeView] = TrackedTable()
        self.replicas: TrackedTable[ReplicaId, ReplicaView] = TrackedTable()
        self.deployments: TrackedTable[DeploymentName, DeploymentView] = TrackedTable()
        self.popularity: dict[DeploymentName, Popularity] = {}
        self.cordons: dict[NodeName, Cordon] = {}
        self._on_node: dict[NodeName, set[ReplicaId]] = {}
        self._of_deployment: dict[DeploymentName, set[ReplicaId]] = {}
        self._keeper = IndexKeeper()
        self._index: Index | None = None
        self._touched = Touched()

    def of(self, deployment: DeploymentName) -> list[ReplicaView]:
        """Replicas of one deployment, the oldest first."""
        found = [self.replicas[i] for i in self._of_deployment.get(deployment, ())]
        return sorted(found, key=lambda r: (r.spec.generation, r.spec.id))

    def replicas_on(self, node: NodeName) -> list[ReplicaView]:
        """Replicas on one node, the oldest first."""
        found = [self.replicas[i] for i in self._on_node.get(node, ())]
        return sorted(found, key=lambda r: (r.spec.generation, r.spec.id))

    def snapshot(
        self,
        *,
        loads: Mapping[ReplicaId, int],
        held: Mapping[DeploymentName, Held],
        settled: bool,
        loads_fresh: bool,
        learnt: Learnt = NOTHING_LEARNT,
    ) -> Snapshot:
        """`loads` and `held` are not to change any more."""
        sources = Sources(self.nodes.view(), self.replicas.view(), self.deployments.view())
        return Snapshot(
            policy=self.policy,
            nodes=sources.nodes,
            replicas=sources.replicas,
            deployments=sources.deployments,
            loads=loads,
            held=held,
            settled=settled,
            loads_fresh=loads_fresh,
            learnt=learnt,
            index=self._followed(sources),
            popularity=dict(self.popularity),
        )

    def touched(self) -> Touched:
        """What has changed since this was last asked, until the last snapshot."""
        touched, self._touched = self._touched, Touched()
        return touched

    def _followed(self, now: Sources) -> Index:
        """The index, after what has changed since the last snapshot."""
        nodes, replicas, deployments = self.nodes.changes(), self.replicas.changes(), self.deployments.changes()
        if self._index is not None and not (nodes or replicas or deployments):
            return self._index
        changed_nodes = self._keeper.follow(now, nodes=nodes, replicas=replicas, deployments=deployments)
        changed = {name for name, before in deployments.items() if _asks_anew(before, self.deployments.get(name))}
        for name, before in replicas.items():
            view = before or self.replicas.get(name)
            if view is not None:
                changed.add(view.spec.deployment)
        self._touched = Touched(
            nodes=self._touched.nodes | changed_nodes, deployments=self._touched.deployments | changed
        )
        self._index = self._keeper.index(now)
        return self._index

    def asked(self, deployment: DeploymentName, requests: int, now: float) -> None:
        """Note that so many requests for a deployment have come."""
        known = self.popularity.get(deployment)
        self.popularity[deployment] = known.asked(requests, now) if known else first_asked(requests, now)

    # -- nodes

    def observe(self, report: NodeReport, *, now: float, wall: float) -> Changes:
        """Take a node's whole report: the truth about its replicas, known or not."""
        before = self.nodes.get(report.name)
        restarted = before is None or before.report.incarnation != report.incarnation
        cordon = self.cordons.get(report.name, OPEN)
        self.nodes[report.name] = NodeView(
            report=report, state=_state(cordon), seen_at=now, last_seen=wall, cordon=cordon
        )
        changes = [self._observe_replica(report.name, status, now, restarted) for status in report.replicas]
        return _merged([*changes, self._forget_absent(report, restarted=restarted)])

    def heard(self, name: NodeName, *, now: float, wall: float) -> Changes:
        """Note that a node lives and that its last report still holds."""
        view = self.nodes[name]
        self.nodes[name] = replace(view, seen_at=now, last_seen=wall, state=self._judged(view, now, now))
        return self._forget_absent(view.report, restarted=False)

    def close(self, name: NodeName, cordon: Cordon) -> None:
        """Note what of a node takes nothing new; an empty cordon opens all of it."""
        self.cordons[name] = cordon
        view = self.nodes.get(name)
        if view is not None:
            silent = view.state in (NodeState.SUSPECT, NodeState.DEAD)
            self.nodes[name] = replace(view, cordon=cordon, state=view.state if silent else _state(cordon))
        for replica in self._on_node.get(name, ()):
            self.put(self.replicas[replica])

    def holders(self, digest: str) -> frozenset[NodeName]:
        """Nodes that are not dead and have a copy of a checkpoint to start from."""
        living = (view for view in self.nodes.values() if view.state is not NodeState.DEAD)
        return frozenset(view.report.name for view in living if view.tier_of(digest) is not None)

    def judge(self, now: float) -> tuple[NodeName, ...]:
        """Judge every node by its silence; forget the replicas of those that died just now, and name those."""
        died = []
        for name, view in self.nodes.items():
            state = self._judged(view, view.seen_at, now)
            if state is not view.state:
                self.nodes[name] = replace(view, state=state)
                if state is NodeState.DEAD:
                    died.append(name)
        for name in died:
            for replica in list(self._on_node.get(name, ())):
                self.forget(replica)
        return tuple(died)

    def next_judgement_at(self, now: float) -> float | None:
        """When silence would next change a judgement."""
        policy = self.policy
        times = [v.seen_at + limit for v in self.nodes.values() for limit in (policy.suspect_s, policy.dead_s)]
        return min((t for t in times if t > now), default=None)

    def _judged(self, view: NodeView, seen_at: float, now: float) -> NodeState:
        if now >= seen_at + self.policy.dead_s:
            return NodeState.DEAD
        if now >= seen_at + self.policy.suspect_s:
            return NodeState.SUSPECT
        return _state(view.cordon)

    # -- replicas

    def put(self, replica: ReplicaView) -> None:
        """Add a replica, or replace what is known of it."""
        cordon = self.cordons.get(replica.node)
        leaving = replica.displaced or (cordon is not None and cordon.draining)
        self.replicas[replica.spec.id] = replica if replica.leaving is leaving else replace(replica, leaving=leaving)
        self._on_node.setdefault(replica.node, set()).add(replica.spec.id)
        self._of_deployment.setdefault(replica.spec.deployment, set()).add(replica.spec.id)

    def forget(self, replica: ReplicaId) -> ReplicaView:
        view = self.replicas.pop(replica)
        self._on_node[view.node].discard(replica)
        self._of_deployment[view.spec.deployment].discard(replica)
        return view

    def intend(self, replica: ReplicaId, intent: Intent, command: Command) -> None:
        self.put(replace(self.replicas[replica], intent=intent, command=command))

    def gives_way(self, replica: ReplicaId, deployment: DeploymentName | None, *, spared_until: float = 0.0) -> None:
        """Note for which deployment it is emptied or ended; None: for none, it stays."""
        self.put(replace(self.replicas[replica], room_for=deployment, spared_until=spared_until))

    def _observe_replica(self, node: NodeName, status: ReplicaStatus, now: float, restarted: bool) -> Changes:
        known = self.replicas.get(status.spec.id)
        if known is None or known.node != node:
            known = self._adopt(node, status, now)
            self.put(known)
            return _change(before=None, after=known)
        after = known if status is known.status else replace(known, status=status)
        if known.intent is Intent.RUN:
            intent = _intent_seen(status.state)
            if intent is not after.intent:
                after = replace(after, intent=intent)
            if after.ready and after.ready_at is None:
                after = replace(after, ready_at=now)
        elif restarted and known.command is Command.DONE:
            # The agent that accepted the command is gone; the one that came after it does not know of it.
            after = replace(after, command=Command.DUE)
        if after is known:
            return _NO_CHANGES
        self.put(after)
        return _change(before=known, after=after)

    def _adopt(self, node: NodeName, status: ReplicaStatus, now: float) -> ReplicaView:
        """Take over a replica that nobody here planned: a controller before this one did, or the store was lost."""
        ready_at = now if status.state is ReplicaState.READY else None
        found = ReplicaView(
            spec=status.spec,
            node=node,
            command=Command.DONE,
            priority=Priority.PREWARM,  # not known: it is raised if a request waits for it
            status=status,
            ready_at=ready_at,
        )
        ending = _intent_seen(status.state)
        if ending is not Intent.RUN or self._is_wanted(status):
            return replace(found, intent=ending)
        intent = Intent.DRAIN if status.state is ReplicaState.READY else Intent.STOP
        return replace(found, intent=intent, command=Command.DUE)

    def _is_wanted(self, status: ReplicaStatus) -> bool:
        view = self.deployments.get(status.spec.deployment)
        return view is not None and any(revision.made(status.spec) for revision in view.revisions())

    def _forget_absent(self, report: NodeReport, *, restarted: bool) -> Changes:
        reported = {status.spec.id for status in report.replicas}
        absent = [self.replicas[i] for i in sorted(self._on_node.get(report.name, set()) - reported)]
        gone = [r for r in absent if _is_gone(r, restarted=restarted)]
        if not gone:
            return _NO_CHANGES
        for replica in gone:
            self.forget(replica.spec.id)
        return Changes(gone=tuple(gone), failed=tuple(_lost_start(r) for r in gone if r.starting))


def _asks_anew(before: DeploymentView | None, after: DeploymentView | None) -> bool:
    """True if a plan may be another one. That what is needed is needed still only puts off when to look again."""
    if before is None or after is None:
        return True
    return (before.needed, len(before.needed_at)) != (after.needed, len(after.needed_at)) or (
        before.current is not after.current
        or before.earlier is not after.earlier
        or before.failures is not after.failures
    )


def _state(cordon: Cordon) -> NodeState:
    """The state of a node that is heard of."""
    if cordon.draining:
        return NodeState.DRAINING
    return NodeState.CORDONED if cordon.node else NodeState.READY


def _is_gone(replica: ReplicaView, *, restarted: bool) -> bool:
    """True if a report that does not show the replica says that it is over, not that it has not begun."""
    if replica.status is not None:
        return True
    if replica.intent is Intent.RUN:
        return restarted and replica.command is not Command.SENT
    return replica.command is Command.DONE or restarted


def _lost_start(replica: ReplicaView) -> ReplicaView:
    status = replica.status or ReplicaStatus(spec=replica.spec, state=ReplicaState.FAILED)
    lost = "its agent restarted while it was starting"
    return replace(
        replica,
        status=replace(status, state=ReplicaState.FAILED, error=lost, error_reason="ENGINE_FAILED"),
    )


def _intent_seen(state: ReplicaState) -> Intent:
    """A replica that its node is ending already is not wanted to run any more."""
    return {ReplicaState.DRAINING: Intent.DRAIN, ReplicaState.STOPPING: Intent.STOP}.get(state, Intent.RUN)


def _change(*, before: ReplicaView | None, after: ReplicaView) -> Changes:
    adopted = (after,) if before is None else ()
    if after.ready and not (before and before.ready):
        return Changes(ready=(after,), adopted=adopted)
    if after.intent is Intent.RUN and after.state is ReplicaState.FAILED:
        newly = before is None or before.state is not ReplicaState.FAILED
        return Changes(failed=(after,) if newly else (), adopted=adopted)
    return Changes(adopted=adopted) if adopted else _NO_CHANGES


def _merged(changes: Iterable[Changes]) -> Changes:
    every = [change for change in changes if change is not _NO_CHANGES]
    if not every:
        return _NO_CHANGES
    return Changes(
        failed=tuple(r for c in every for r in c.failed),
        ready=tuple(r for c in every for r in c.ready),
        adopted=tuple(r for c in every for r in c.adopted),
        gone=tuple(r for c in every for r in c.gone),
    )
