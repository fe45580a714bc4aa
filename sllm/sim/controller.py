"""Controller: the production decisions, fed by simulated nodes and gateways, and carried out on them.

What it knows is kept by the controller's own bookkeeping (`sllm.core.cluster`), what starts take is learnt as it learns
it (`sllm.scheduler.estimator`), and how many replicas are needed is remembered by its own rules
(`sllm.scheduler.autoscale`); a pass is that of `sllm.controller.planning`, without what
only real time and real wires need. News takes no time: reports and commands arrive at the instant they are sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import assert_never

from sllm.core.cluster import Changes, ClusterState
from sllm.core.ids import DeploymentName, NodeName, ReplicaId, RequestId
from sllm.core.migration import Outlook
from sllm.core.snapshot import Command, Intent, ReplicaView, Snapshot
from sllm.core.startup import NOTHING_LEARNT, Estimate, Learnt
from sllm.errors import SllmError
from sllm.scheduler import autoscale, residency, retry
from sllm.scheduler.agenda import Agenda
from sllm.scheduler.displacement import SPARED_S
from sllm.scheduler.estimator import Estimator
from sllm.scheduler.plan import (
    Action,
    DrainReplica,
    KeepReplica,
    MoveRequests,
    Plan,
    RaisePriority,
    RemoveDeployment,
    StartReplica,
    StopReplica,
)
from sllm.scheduler.residency_plan import Recent
from sllm.sim.events import EventQueue
from sllm.sim.gateway import Gateway
from sllm.sim.moving import Mover
from sllm.sim.node import Node
from sllm.sim.spec import Cluster, ModelSpec

Decide = Callable[[Snapshot, float, Random], Plan]
"""A policy: what to do now. It may draw from the given randomness, and from nothing else."""

_NOTHING = Changes()
_MOST_PASSES = 100  # at one instant: a policy that wants more never comes to rest


class Controller:
    """`thorough`: pass after every event, and look at all; else only where something changed that a plan can depend on,
    at what it can depend on, which is quicker and comes to the same (`tests/sim`), but for displacement, whose gain
    changes with the time alone."""

    def __init__(
        self,
        cluster: Cluster,
        nodes: Mapping[NodeName, Node],
        gateway: Gateway,
        events: EventQueue,
        decide: Decide,
        *,
        rng: Random,
        thorough: bool = False,
    ) -> None:
        self.passes = 0
        self.starts = 0
        self.stopped_busy = 0
        self.estimator = Estimator()
        self._known = cluster.known
        self._present = len(cluster.present)
        self._estimates: dict[ReplicaId, Estimate] = {}
        self._models: dict[DeploymentName, ModelSpec] = {model.deployment.name: model for model in cluster.models}
        self._by_digest = {model.checkpoint.digest: model for model in cluster.models}
        self._nodes = nodes
        self._gateway = gateway
        self._events = events
        self._decide = decide
        self._rng = rng
        self._thorough = thorough
        self._state = ClusterState(cluster.policy)
        for model in cluster.models:
            self._state.deployments[model.deployment.name] = model.view()
        self._dirty: dict[NodeName, Node] = dict(nodes)
        self._touched: dict[DeploymentName, None] = dict.fromkeys(self._models)
        self._agenda = Agenda()
        self._were_held: set[DeploymentName] = set()
        self._due = True
        self._displaced: set[ReplicaId] = set()
        self._mover = Mover(nodes, gateway, events, self._moved)
        self._wakes: set[float] = set()
        self._recent = Recent()
        self.prefetches = 0
        self.copies = 0
        self._passed_at = 0.0
        self._passes_now = 0
        # To count with; plans are made from copies, which nothing can change under them.
        self._now_view = Snapshot(
            policy=cluster.policy,
            nodes=self._state.nodes,
            replicas=self._state.replicas,
            deployments=self._state.deployments,
            loads=gateway.loads,
            held=gateway.held,
        )
        if residency.enabled(self._now_view):
            events.at(residency.EVERY_S, self._prepare)

    # -- news

    def changed(self, node: Node) -> None:
        self._dirty[node.spec.name] = node

    @property
    def migrations(self) -> int:
        """Requests that were handed over while they ran."""
        return self._mover.count

    def _moved(self) -> None:
        self._due = True

    def touched(self, deployment: DeploymentName) -> None:
        self._touched[deployment] = None

    def asked(self, deployment: DeploymentName) -> None:
        """A request for it has come."""
        self._state.asked(deployment, 1, self._events.now)

    def heartbeat_missing(self, node: NodeName) -> None:
        """From now on it is not heard of."""
        now, policy = self._events.now, self._state.policy
        self._dirty.pop(node, None)
        self._state.heard(node, now=now, wall=now)
        for limit_s in (policy.suspect_s, policy.dead_s):
            self._events.at(now + limit_s, self._judge)

    def settle(self) -> None:
        """Draw the consequences of what happened at this instant, and theirs, until nothing is left to do now."""
        # How long others run on is looked at anew at every event.
        self._due = self._due or bool(self._gateway.held or self._displaced)
        for number in itertools.count():
            for replica in self._displaced:
                node = self._nodes[self._state.replicas[replica].node]
                self._dirty[node.spec.name] = node  # what runs there still is in its report
            news = [self._observe(node) for node in self._dirty.values() if node.up]
            self._dirty.clear()
            # Reports in answer to the first plan say what it did.
            awaited = bool(self._gateway.held or self._displaced) and number == 0
            if self._needs_changed() or any(news) or (news and awaited):
                self._due = True
            if not (self._due or self._thorough):
                return
            if not self._pass() and not self._dirty and not self._touched:
                return

    def _observe(self, node: Node) -> bool:
        """Take a node's report; say whether replicas have come to serve or are gone, or the node has come back."""
        now, name = self._events.now, node.spec.name
        before = self._state.nodes.get(name)
        report = node.report()
        self.estimator.reported(report, now)
        changes = self._state.observe(report, now=now, wall=now)
        for view in changes.ready:
            self._learn(view, node)
            self._gateway.open(node.replicas[view.spec.id])
        for view in changes.gone:
            self._forgotten(view)
        after = self._state.nodes[name]
        back = before is None or before.report.incarnation != after.report.incarnation
        return back or changes != _NOTHING

    def _learn(self, view: ReplicaView, node: Node) -> None:
        estimate = self._estimates.pop(view.spec.id, None)
        assert view.status is not None  # the report said that it is ready
        self.estimator.started(view.status, node.spec.device_kind, estimate=estimate)

    def _forgotten(self, view: ReplicaView) -> None:
        self._estimates.pop(view.spec.id, None)
        self._displaced.discard(view.spec.id)
        self._gateway.close(view.spec.id, view.spec.deployment)
        self._touched[view.spec.deployment] = None

    def _judge(self) -> None:
        now = self._events.now
        for node in self._nodes.values():
            if node.up and node.spec.name in self._state.nodes:
                self._state.heard(node.spec.name, now=now, wall=now)
        before = self._state.replicas.view()
        self._state.judge(now)
        for name in before.keys() - self._state.replicas.keys():
            self._forgotten(before[name])
        self._due = True

    def _needs_changed(self) -> bool:
        """Remember what is needed now; say whether a plan may be another one for it.

        While nobody waits, a plan depends on loads only by how many replicas they need: which one would go first is
        asked only if one is to go, and then something else has changed.
        """
        changed = bool(self._touched) and bool(self._gateway.held or self._displaced)
        for name in self._touched:
            view = self._state.deployments[name]
            demand = autoscale.demand(self._now_view, view, self._state.of(name))
            after = autoscale.remember(view, demand, self._events.now)
            self._state.deployments[name] = after
            changed = changed or after.needed != view.needed
            self._put_on_agenda(name)
        self._touched.clear()
        return changed

    def _put_on_agenda(self, name: DeploymentName) -> None:
        """That other replicas are needed is seen from the deployment."""
        if name in self._gateway.held:
            self._agenda.touch(name)
            self._were_held.add(name)
        elif name in self._were_held:
            self._agenda.touch(name)
            self._were_held.discard(name)
        else:
            self._agenda.touch_others(name)

    # -- plans

    def _pass(self) -> bool:
        """Plan, and carry it out; say whether there was anything to do."""
        now = self._events.now
        self._due = False
        self.passes += 1
        self._passes_now = self._passes_now + 1 if now == self._passed_at else 1
        self._passed_at = now
        if self._passes_now > _MOST_PASSES:
            raise SllmError(f"the policy does not come to rest: {_MOST_PASSES} plans at {now:.3f} s")
        snapshot = self._snapshot()
        plan = self._decide(snapshot, now, self._rng)
        self._agenda.planned(snapshot, plan)
        for action in plan.actions:
            self._act(action)
        if self._displaced:
            self._mover.advance(self._whole())
        for at in (plan.wake_at, self._agenda.next_wake()):
            if at is not None and at not in self._wakes:
                self._wakes.add(at)
                self._events.at(at, self._wake, at)
        return bool(plan.actions)

    def _snapshot(self) -> Snapshot:
        """What is known, and what is due."""
        snapshot = self._whole()
        if snapshot.held:
            snapshot = replace(snapshot, running=self._running(snapshot))
        if self._thorough:
            return snapshot
        self._agenda.noted(self._state.touched())
        return self._agenda.due(snapshot, self._events.now)

    def _whole(self) -> Snapshot:
        """All that is known."""
        return self._state.snapshot(
            loads=self._gateway.loads.view(),
            held=self._gateway.held.view(),
            settled=True,
            loads_fresh=True,
            learnt=self._learnt(),
        )

    def _learnt(self) -> Learnt:
        learnt = self.estimator.learnt(self._events.now)
        return learnt if self._known is NOTHING_LEARNT else learnt.over(self._known)

    def _prepare(self) -> None:
        """Have checkpoints lie where they will be wanted."""
        now = self._events.now
        copying = any(node.copying for node in self._nodes.values())
        plan = residency.decide(self._whole(), self._recent, now, copying=copying)
        self._recent.note(plan, now)
        for prefetch in plan.prefetches:
            self.prefetches += 1
            if self._nodes[prefetch.node].up:
                self._nodes[prefetch.node].prefetch(prefetch.digest, prefetch.instead_of)
        for copy in plan.copies:
            self.copies += 1
            model = self._by_digest[copy.digest]
            if self._nodes[copy.node].up:
                self._nodes[copy.node].copy(model.checkpoint)
        self._events.at(now + residency.EVERY_S, self._prepare)

    def _running(self, snapshot: Snapshot) -> dict[ReplicaId, dict[RequestId, Outlook]]:
        """What is expected of all requests that run."""
        outlook, found = self._gateway.outlook, {}
        for replica in snapshot.loads:
            node = self._nodes[snapshot.replicas[replica].node]
            there = node.replicas.get(replica)
            if there is not None and not there.silent:
                found[replica] = {request.id: outlook(request) for request in there.running.values()}
        return found

    def _wake(self, at: float) -> None:
        self._wakes.discard(at)
        self._due = True

    def _act(self, action: Action) -> None:
        match action:
            case StartReplica():
                self._start(action)
            case RaisePriority():
                view = self._state.replicas[action.replica]
                self._state.put(replace(view, priority=action.priority))
                self._nodes[view.node].raise_priority(action.replica, action.priority)
            case DrainReplica():
                self._end(action.replica, Intent.DRAIN, action.room_for)
            case StopReplica():
                self._end(action.replica, Intent.STOP, action.room_for)
            case MoveRequests():
                self._empty(action)
            case KeepReplica():
                self._keep(action.replica)
            case RemoveDeployment():
                raise SllmError(f"the policy removes {action.deployment}, which nobody has deleted")
            case _:
                assert_never(action)

    def _start(self, action: StartReplica) -> None:
        self.starts += 1
        model, node = self._models[action.deployment], self._nodes[action.node]
        spec = model.replica(self._present + self.starts, action.devices)
        self._state.put(ReplicaView(spec=spec, node=action.node, priority=action.priority, command=Command.DONE))
        if action.estimate is not None:
            self._estimates[spec.id] = action.estimate
        if node.up:
            node.start(spec, model, action.priority)
            return
        # As the real one does when a node does not answer: it may have begun there, and the deployment waits a little.
        self._unanswered(spec.id, Intent.STOP)
        self._state.deployments[action.deployment] = retry.hindered(
            self._state.deployments[action.deployment],
            action.node,
            spec.revision,
            error=f"{action.node} does not answer",
            reason="UNAVAILABLE",
            now=self._events.now,
            policy=self._state.policy,
        )

    def _empty(self, action: MoveRequests) -> None:
        """It gets nothing new; what runs there is moved as there is room for it."""
        self._state.gives_way(action.replica, action.room_for)
        view = self._state.replicas[action.replica]
        self._gateway.close(action.replica, view.spec.deployment)
        self._touched[view.spec.deployment] = None
        self._displaced.add(action.replica)

    def _keep(self, replica: ReplicaId) -> None:
        self._state.gives_way(replica, None, spared_until=self._events.now + SPARED_S)
        self._displaced.discard(replica)
        view = self._state.replicas[replica]
        there = self._nodes[view.node].replicas.get(replica)  # None: its node has failed
        if view.ready and there is not None:
            self._gateway.open(there)

    def _end(self, replica: ReplicaId, intent: Intent, room_for: DeploymentName | None) -> None:
        view = self._state.replicas[replica]
        if room_for is not None:
            self._state.gives_way(replica, room_for)
        node = self._nodes[view.node]
        self._gateway.close(replica, view.spec.deployment)
        self._touched[view.spec.deployment] = None
        if not node.up:
            self._unanswered(replica, intent)
            return
        self._state.intend(replica, intent, Command.DONE)
        if intent is Intent.DRAIN:
            node.drain(replica, self._state.policy.drain_s)
            return
        self.stopped_busy += replica in self._gateway.loads
        node.stop(replica)

    def _unanswered(self, replica: ReplicaId, intent: Intent) -> None:
        self._due = True  # to see when to tell it again
        self._state.intend(replica, intent, Command.DUE)
        retry_at = self._events.now + self._state.policy.heartbeat_s
        self._state.put(replace(self._state.replicas[replica], retry_at=retry_at))
