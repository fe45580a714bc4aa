"""The index is what a look at everything would find, after every event; decisions made by it are those without it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.cluster import ClusterState
from sllm.core.device import DeviceKind, DeviceState
from sllm.core.index import Index, Sources
from sllm.core.node import Cordon
from sllm.core.replica import ReplicaState, ReplicaStatus
from sllm.core.residency import ResidencyState, Tier
from sllm.core.snapshot import Command, Failures, Held, Intent, Policy, ReplicaView
from sllm.core.startup import Learnt, Level, StartTimes
from sllm.scheduler import placement
from sllm.scheduler.agenda import Agenda
from sllm.scheduler.autoscale import demand, remember
from sllm.scheduler.placement import Placement, place
from sllm.scheduler.plan import DrainReplica, RaisePriority, RemoveDeployment, StartReplica
from sllm.scheduler.reconcile import reconcile
from sllm.scheduler.room import Room
from tests.scheduler import naive

NODES, APPS, DIGESTS = "abcd", ("app", "bee", "cat"), ("m", "n")
HALF = Level(value=0.5, observations=3)
SECONDS = st.sampled_from([0.0, 0.5, 5.0, 30.0])


def facts(index: Index):
    """What an index says, by name: slots are given in the order in which nodes came."""

    def names(nodes):
        return {entry.name for entry in index.those(nodes)}

    return SimpleNamespace(
        entries={
            name: (e.view, dict(e.tiers), e.replicas, e.taken, e.free)
            for name, e in index.entries.items()
            if e.view is not None or e.replicas
        },
        at_rest={digest: names(nodes) for digest, nodes in index.at_rest.items()},
        in_memory={digest: names(nodes) for digest, nodes in index.in_memory.items()},
        sets=[names(n) for n in (index.ready, index.warm, index.starting, index.leaving, index.surplus)],
        with_free=[found for nodes in index.with_free if (found := names(nodes))],
        with_replicas=Counter({name: n for n, nodes in enumerate(index.with_replicas) for name in names(nodes)}),
        of_deployment=dict(index.of_deployment),
        astray=dict(index.astray),
    )


class Events:
    """A cluster to which things happen, planned for by what has changed only."""

    def __init__(self, make, data) -> None:
        self.make, self.draw = make, data.draw
        self.state = ClusterState(Policy())
        self.agenda = Agenda()
        self.loads, self.held = {}, {}
        self.now, self.started = 100.0, 0
        self.pinned = frozenset()
        self.planned_from = None
        for name in APPS:
            self.deploy(name)

    # -- what happens

    def anything(self) -> None:
        getattr(self, self.draw(st.sampled_from(EVENTS)))()

    def report(self) -> None:
        """A node says what is there: devices, copies, and of its replicas what has become of them."""
        name = self.draw(st.sampled_from(NODES))
        there = self.state.replicas_on(name)
        kept = [r for r in there if r.intent is Intent.RUN or self.draw(st.booleans())]
        leased = {device for r in kept for device in r.spec.devices}
        states = {True: DeviceState.LEASED, False: DeviceState.FREE}
        lost = self.draw(st.integers(0, 9)) == 0
        devices = [self.make.device(f"d{i}", states[f"d{i}" in leased]) for i in range(3)]
        if lost:
            devices[2] = replace(devices[2], state=DeviceState.LOST)
        residencies = [
            self.make.residency(
                digest, tier, self.draw(st.sampled_from([ResidencyState.READY, ResidencyState.LOADING]))
            )
            for digest in DIGESTS
            for tier in (Tier.SSD, Tier.DRAM, Tier.DEVICE)
            if self.draw(st.integers(0, 3)) > 0
        ]
        report = replace(
            self.make.node(name, warm=self.draw(st.integers(0, 4)) > 0).report,
            devices=tuple(devices),
            residencies=tuple(residencies),
            replicas=tuple(self._status(r) for r in kept),
        )
        self.state.observe(report, now=self.now, wall=0.0)

    def _status(self, replica: ReplicaView) -> ReplicaStatus:
        states = [ReplicaState.STARTING, ReplicaState.READY, ReplicaState.READY, ReplicaState.FAILED]
        if replica.ready:
            states = [ReplicaState.READY]
        elif replica.intent is not Intent.RUN:
            states = [ReplicaState.DRAINING, ReplicaState.STOPPING]
        return ReplicaStatus(spec=replica.spec, state=self.draw(st.sampled_from(states)))

    def requests(self) -> None:
        """Requests come to wait, or wait no more."""
        name = self.draw(st.sampled_from(APPS))
        count = self.draw(st.integers(0, 3))
        since = self.held[name].since if name in self.held else self.now
        self.held = {n: h for n, h in self.held.items() if n != name}
        if count:
            self.held[name] = Held(count=count, since=since)

    def load(self) -> None:
        """A replica gets or loses requests."""
        ready = sorted(name for name, r in self.state.replicas.items() if r.ready)
        if ready:
            name = self.draw(st.sampled_from(ready))
            self.loads = {n: count for n, count in self.loads.items() if n != name}
            if count := self.draw(st.integers(0, 2)):
                self.loads[name] = count

    def time(self) -> None:
        self.now += self.draw(SECONDS)

    def cordon(self) -> None:
        name = self.draw(st.sampled_from(NODES))
        draining = self.draw(st.booleans())
        devices = frozenset(self.draw(st.sets(st.sampled_from(["d0", "d1"]))))
        self.state.close(name, Cordon(node=draining, devices=devices, draining=draining))

    def silence(self) -> None:
        self.state.judge(self.now)

    def deploy(self, name: str | None = None) -> None:
        name = name or self.draw(st.sampled_from(APPS))
        before = self.state.deployments.get(name)
        number = before.current.number + 1 if before else 1
        most = self.draw(st.integers(1, 3))
        view = self.make.deployment(
            name,
            digest=self.draw(st.sampled_from(DIGESTS)),
            number=number,
            deleting=before is not None and self.draw(st.integers(0, 5)) == 0,
            min_replicas=self.draw(st.integers(0, 1)),
            max_replicas=most,
            target_concurrency=1,
            keep_alive_s=self.draw(st.sampled_from([0.0, 10.0])),
            devices=self.draw(st.sampled_from([1, 1, 2])),
        )
        self.state.deployments[name] = view

    def failure(self) -> None:
        name = self.draw(st.sampled_from(APPS))
        if view := self.state.deployments.get(name):
            failures = Failures(revision=view.current.number, count=1, retry_at=self.now + self.draw(SECONDS))
            self.state.deployments[name] = replace(view, failures=failures)

    def pin(self) -> None:
        self.pinned = frozenset(n for n in self.state.replicas if self.draw(st.booleans()))

    # -- what follows

    def snapshot(self):
        snapshot = self.state.snapshot(
            loads=dict(self.loads), held=dict(self.held), settled=True, loads_fresh=True, learnt=self.learnt
        )
        self.agenda.noted(self.state.touched())
        snapshot = replace(snapshot, pinned=self.pinned)
        self.agenda.compare(self.planned_from, snapshot)
        return snapshot

    learnt = Learnt(
        reading={("a", Tier.SSD): Level(value=0.01, observations=3)},
        reading_anywhere={Tier.SSD: Level(value=0.02, observations=3)},
        starts_of_kind={DeviceKind.CPU: StartTimes(grant=HALF, fork=HALF, whole=HALF, rest=HALF)},
        warming_anywhere=Level(value=3.0, observations=1),
    )

    def plan(self):
        """By what has changed, and by everything."""
        for name in sorted(self.agenda.touched(self.snapshot())):
            snapshot = self.snapshot()
            view = snapshot.deployments[name]
            self.state.deployments[name] = remember(view, demand(snapshot, view, self.state.of(name)), self.now)
        snapshot = self.snapshot()
        whole = reconcile(snapshot, self.now)
        due = self.agenda.due(snapshot, self.now)
        plan = reconcile(due, self.now)
        self.planned_from = due
        self.agenda.planned(due, plan)
        return snapshot, plan, whole

    def carry_out(self, plan) -> None:
        for action in plan.actions:
            if isinstance(action, StartReplica):
                self.started += 1
                view = self.state.deployments[action.deployment].current
                spec = self.make.replica(
                    f"{self.started:03d}",
                    on=action.node,
                    deployment=action.deployment,
                    revision=view.number,
                    devices=action.devices,
                    generation=self.started,
                ).spec
                spec = replace(spec, digest=view.deployment.digest)
                self.state.put(ReplicaView(spec=spec, node=action.node, priority=action.priority, command=Command.DONE))
            elif isinstance(action, RaisePriority):
                self.state.put(replace(self.state.replicas[action.replica], priority=action.priority))
            elif isinstance(action, RemoveDeployment):
                del self.state.deployments[action.deployment]
                self.held.pop(action.deployment, None)
            else:
                intent = Intent.DRAIN if isinstance(action, DrainReplica) else Intent.STOP
                known = self.draw(st.integers(0, 4)) > 0
                self.state.intend(action.replica, intent, Command.DONE if known else Command.DUE)
                if not known:
                    self.state.put(replace(self.state.replicas[action.replica], retry_at=self.now + 2.0))


EVENTS = (
    *("report", "report", "report", "requests", "requests", "load", "time"),
    *("cordon", "silence", "deploy", "failure", "pin"),
)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_plan_of_what_has_changed_is_the_plan_of_everything(make, data):
    """And the index is the one that is made anew from all there is."""
    events = Events(make, data)
    for _ in range(data.draw(st.integers(1, 25))):
        events.anything()
        snapshot, plan, whole = events.plan()
        sources = Sources(snapshot.nodes, snapshot.replicas, snapshot.deployments)
        assert Index.of(snapshot) is snapshot.index
        assert facts(Index.of(snapshot)) == facts(Index.made_of(sources))
        assert plan.actions == whole.actions
        assert events.agenda.reasons.keys() == whole.reasons.keys()
        later = [at for at in whole.wakes.values() if at > events.now]
        assert not later or (events.agenda.next_wake() or 0.0) <= min(later)
        events.carry_out(plan)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_replica_goes_where_a_look_at_every_node_would_put_it(make, data):
    events = Events(make, data)
    for _ in range(data.draw(st.integers(3, 12))):
        events.report()
    for _ in range(data.draw(st.integers(0, 10))):
        events.anything()
        events.carry_out(events.plan()[1])
    snapshot = events.snapshot()
    for view in snapshot.deployments.values():
        found = place(Room(snapshot), view)
        expected = naive.place(snapshot, view)
        assert (found.node if isinstance(found, Placement) else None) == expected
        if isinstance(found, Placement):
            assert found.estimate == naive.options(snapshot, view)[found.node]
            assert {c.node for c in found.candidates if not c.refused} == {found.node}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_of_many_nodes_one_of_those_that_have_it_in_memory_is_taken_if_any_has(make, data):
    """Not all are looked at then: among those that have it in memory the estimate is the least there is."""
    count = data.draw(st.integers(placement.LOOKED_AT + 1, 60))
    in_memory = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=20))
    cold = data.draw(st.sets(st.integers(0, count - 1), max_size=count // 2)) - {min(in_memory)}
    nodes = [
        make.node(f"n{i:02d}", holds=[("m", Tier.DRAM if i in in_memory else Tier.SSD)], warm=i not in cold)
        for i in range(count)
    ]
    snapshot = make.snapshot(nodes=nodes, deployments=[make.deployment()], learnt=Events.learnt)
    view = snapshot.deployments["app"]
    found = place(Room(snapshot), view)
    assert isinstance(found, Placement)
    assert found.estimate.total_s == min(of.total_s for of in naive.options(snapshot, view).values())
    assert (found.estimate.size_bytes, found.holders) == (0, count)


def test_where_devices_of_many_nodes_are_too_small_the_others_are_found(make):
    small = [
        make.node(f"n{i:02d}", devices=[make.device("d0", memory_bytes=10)]) for i in range(placement.LOOKED_AT + 8)
    ]
    snapshot = make.snapshot(nodes=[*small, make.node("z")], deployments=[make.deployment()])
    found = place(Room(snapshot), snapshot.deployments["app"])
    assert isinstance(found, Placement)
    assert found.node == "z"


def test_an_index_is_not_used_for_another_snapshot_than_it_was_kept_for(make):
    state = ClusterState(Policy())
    state.observe(make.node("a").report, now=0.0, wall=0.0)
    state.deployments["app"] = make.deployment()
    snapshot = state.snapshot(loads={}, held={}, settled=True, loads_fresh=True)
    without = replace(snapshot, nodes={})
    assert isinstance(place(Room(snapshot), snapshot.deployments["app"]), Placement)
    assert not isinstance(place(Room(without), snapshot.deployments["app"]), Placement)


@pytest.mark.parametrize("start", [0, 1, 7, 1_000_003])
def test_batches_are_all_of_a_set_wherever_they_begin(make, start):
    snapshot = make.snapshot(nodes=[make.node(f"n{i}") for i in range(10)])
    index = Index.of(snapshot)
    batches = list(index.batches(index.ready, 3, start=start))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert {entry.name for batch in batches for entry in batch} == set(snapshot.nodes)
