"""What holds of every plan, whatever the cluster looks like."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.device import DeviceKind, DeviceState
from sllm.core.migration import Outlook
from sllm.core.node import Cordon, NodeState
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState
from sllm.core.residency import Tier
from sllm.core.snapshot import Command, Failures, Intent
from sllm.core.startup import Learnt, Level, StartTimes
from sllm.scheduler.plan import (
    DrainReplica,
    KeepReplica,
    MoveRequests,
    RaisePriority,
    RemoveDeployment,
    StartReplica,
    StopReplica,
)
from sllm.scheduler.reconcile import reconcile

NODES, APPS, NOW = "abc", ("app", "bee"), 100.0
TIMES = st.floats(0, 200)


@st.composite
def failures(draw):
    if not draw(st.booleans()):
        return None
    return Failures(revision=2, count=1, retry_at=draw(TIMES), given_up=draw(st.booleans()))


@st.composite
def snapshots(draw, make):
    """Clusters of three nodes with up to three devices, and two deployments at revision 2."""
    free = {n: [f"d{i}" for i in range(draw(st.integers(0, 3)))] for n in NODES}
    nodes = []
    for name in NODES:
        states = [draw(st.sampled_from([DeviceState.FREE, DeviceState.FREE, DeviceState.LEASED])) for _ in free[name]]
        devices = [make.device(d, s) for d, s in zip(free[name], states, strict=True)]
        holds = draw(st.sampled_from([(), (("m", Tier.SSD),), (("m", Tier.DRAM),)]))
        state = draw(st.sampled_from([NodeState.READY, NodeState.READY, NodeState.SUSPECT, NodeState.DRAINING]))
        closed = frozenset(d for d in free[name] if draw(st.integers(0, 9)) == 0)
        node = make.node(name, devices=devices, holds=holds, state=state)
        nodes.append(replace(node, cordon=Cordon(draining=state is NodeState.DRAINING, devices=closed)))
    replicas = []
    for name in NODES:
        while free[name] and draw(st.booleans()):
            replica = draw_replica(draw, make, name, free[name].pop(), len(replicas))
            draining = nodes[NODES.index(name)].cordon.draining
            replicas.append(replace(replica, leaving=replica.displaced or draining))
    apps = [draw_deployment(draw, make, name) for name in APPS]
    loads = {r.spec.id: draw(st.integers(0, 3)) for r in replicas if r.serves}
    running = {
        replica: {f"req-{replica}-{number}": draw(outlooks()) for number in range(count)}
        for replica, count in loads.items()
        if count and draw(st.integers(0, 5))
    }
    held = {name: count for name in APPS if (count := draw(st.integers(0, 20)))}
    return make.snapshot(
        nodes=nodes,
        replicas=replicas,
        deployments=apps,
        loads=loads,
        held=held,
        settled=draw(st.booleans()),
        loads_fresh=draw(st.booleans()),
        pinned=frozenset(r.spec.id for r in replicas if draw(st.integers(0, 4)) == 0),
        learnt=draw(learnt()),
        running=running,
    )


def outlooks():
    return st.builds(
        Outlook,
        pause_s=st.floats(0, 2),
        move_s=st.floats(0, 5),
        left_s=st.none() | st.floats(0, 100),
        moves=st.integers(0, 4),
    )


@st.composite
def learnt(draw):
    """Of some nodes and checkpoints something is known, of others nothing."""
    levels = st.builds(Level, value=st.floats(0, 100), observations=st.integers(0, 9))
    times = {name: st.none() | levels for name in ("grant", "fork", "whole", "rest")}
    starts = st.builds(StartTimes, **times)
    return Learnt(
        reading=draw(st.dictionaries(st.sampled_from([(n, Tier.SSD) for n in NODES]), levels)),
        reading_anywhere=draw(st.dictionaries(st.just(Tier.SSD), levels)),
        starts=draw(st.dictionaries(st.just(("m", DeviceKind.CPU)), starts)),
        starts_of_kind=draw(st.dictionaries(st.just(DeviceKind.CPU), starts)),
        warming_anywhere=draw(st.none() | levels),
    )


def draw_replica(draw, make, node, device, number):
    found = make.replica(
        str(number),
        on=node,
        devices=[device],
        deployment=draw(st.sampled_from(APPS)),
        revision=draw(st.sampled_from([2, 2, 1])),
        state=draw(st.sampled_from([None, ReplicaState.READY, ReplicaState.READY, *ReplicaState])),
        intent=draw(st.sampled_from([Intent.RUN, Intent.RUN, Intent.RUN, *Intent])),
        command=draw(st.sampled_from(Command)),
        priority=draw(st.sampled_from([Priority.REQUEST, Priority.PREWARM])),
        retry_at=draw(TIMES),
        generation=number,
    )
    # Long ready, just ready, or emptied for the other deployment already.
    found = replace(found, ready_at=draw(st.sampled_from([None, 0.0, 0.0, NOW])))
    if found.ready and draw(st.integers(0, 5)) == 0:
        found = replace(found, room_for=draw(st.sampled_from(APPS)), leaving=True)
    return found


def draw_deployment(draw, make, name):
    minimum = draw(st.integers(0, 2))
    maximum = max(1, minimum + draw(st.integers(0, 2)))
    needed_at = sorted(draw(st.lists(st.floats(0, NOW), max_size=4)), reverse=True)
    view = make.deployment(
        name,
        number=2,
        min_replicas=minimum,
        max_replicas=maximum,
        needed=draw(st.integers(0, maximum)),
        needed_at=needed_at,
        devices=draw(st.integers(1, 2)),
        deleting=draw(st.booleans()),
        keep_alive_s=10.0,
    )
    return replace(view, failures=draw(failures()))


def carried_out(make, snapshot, plan):
    """The snapshot as it is when the plan's commands have been sent."""
    replicas, deployments = dict(snapshot.replicas), dict(snapshot.deployments)
    for number, action in enumerate(plan.actions):
        if isinstance(action, StartReplica):
            new = make.replica(
                f"new{number}",
                on=action.node,
                devices=action.devices,
                deployment=action.deployment,
                revision=deployments[action.deployment].current.number,
                state=None,
                command=Command.SENT,
                priority=action.priority,
                generation=1000 + number,
            )
            replicas[new.spec.id] = new
        elif isinstance(action, RaisePriority):
            replicas[action.replica] = replace(replicas[action.replica], priority=action.priority)
        elif isinstance(action, RemoveDeployment):
            del deployments[action.deployment]
        elif isinstance(action, MoveRequests):
            replicas[action.replica] = replace(replicas[action.replica], room_for=action.room_for, leaving=True)
        elif isinstance(action, KeepReplica):
            kept = replace(replicas[action.replica], room_for=None, spared_until=NOW + 1.0)
            replicas[action.replica] = replace(kept, leaving=snapshot.nodes[kept.node].cordon.draining)
        else:
            intent = Intent.DRAIN if isinstance(action, DrainReplica) else Intent.STOP
            before = replicas[action.replica]
            room_for = action.room_for or before.room_for
            replicas[action.replica] = replace(before, intent=intent, command=Command.SENT, room_for=room_for)
    return replace(snapshot, replicas=replicas, deployments=deployments)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_every_plan_is_safe(make, data):
    snapshot = data.draw(snapshots(make))
    plan = reconcile(snapshot, NOW)
    assert plan == reconcile(snapshot, NOW), "the same snapshot gives the same plan"
    assert plan.wake_at is None or plan.wake_at > NOW
    check_leases(snapshot, plan)
    check_endings(snapshot, plan)
    after = carried_out(make, snapshot, plan)
    check_bounds(snapshot, after)
    check_priorities(snapshot, after)
    if any(isinstance(action, KeepReplica) for action in plan.actions):
        after = carried_out(make, after, reconcile(after, NOW))  # what stays may be more than is needed
    assert reconcile(after, NOW).actions == (), "an unchanged world gives an empty plan"


def check_leases(snapshot, plan):
    """No device is leased twice, nor one that is not free, nor on a node that takes no new work."""
    held = {(r.node, d) for r in snapshot.replicas.values() for d in r.spec.devices}
    for action in plan.actions:
        if isinstance(action, StartReplica):
            node = snapshot.nodes[action.node]
            assert node.state is NodeState.READY
            assert len(action.devices) == snapshot.deployments[action.deployment].current.deployment.spec.devices
            for device in action.devices:
                assert (action.node, device) not in held
                assert device not in node.cordon.devices
                assert {d.id: d.state for d in node.report.devices}[device] is DeviceState.FREE
                held.add((action.node, device))


def check_endings(snapshot, plan):
    """Each replica is told at most once, and a start is ended only if nobody wants it any more."""
    ends = DrainReplica | StopReplica | MoveRequests | KeepReplica
    told = Counter(a.replica for a in plan.actions if isinstance(a, ends))
    assert all(count == 1 for count in told.values())
    for replica in map(snapshot.replicas.__getitem__, told):
        view = snapshot.deployments[replica.spec.deployment]
        if replica.starting and replica.spec.revision == view.current.number:
            assert view.current.deployment.deleting


def check_bounds(before, after):
    for view in after.deployments.values():
        if view.current.deployment.deleting:
            continue
        was, now = (sum(current(r, view) for r in s.replicas.values()) for s in (before, after))
        # One whose displacement is given up is back beside the one that was started for what it had.
        back = sum(
            current(r, view) and before.replicas[i].displaced for i, r in after.replicas.items() if i in before.replicas
        )
        spec = view.current.deployment.spec
        assert now <= max(was, spec.max_replicas) + back
        assert now >= min(was, spec.min_replicas)


def check_priorities(before, after):
    """No more starts go at the priority of requests than requests wait for; none is lowered."""
    for view in after.deployments.values():
        held = after.held.get(view.name)
        awaited = -(-held.count // view.current.deployment.spec.target_concurrency) if held else 0
        urgent = [
            replica
            for replica in after.replicas.values()
            if current(replica, view) and replica.starting and replica.priority is Priority.REQUEST
        ]
        were = [before.replicas[r.spec.id].priority for r in urgent if r.spec.id in before.replicas]
        assert len(urgent) <= max(awaited, sum(priority is Priority.REQUEST for priority in were))
    for replica in before.replicas.values():
        assert after.replicas[replica.spec.id].priority <= replica.priority


def current(replica, view):
    return replica.live and replica.spec.deployment == view.name and replica.spec.revision == view.current.number


@given(st.data())
def test_a_held_request_gets_a_replica_when_there_is_room_for_one(make, data):
    snapshot = data.draw(snapshots(make))
    view = make.deployment("solo", needed=1)
    free = make.node("free", devices=["d0", "d1", "d2"])
    snapshot = replace(
        snapshot,
        settled=True,
        nodes={**snapshot.nodes, "free": free},
        deployments={"solo": view},
        held=make.snapshot(held={"solo": 1}).held,
    )
    starts = [a for a in reconcile(snapshot, NOW).actions if isinstance(a, StartReplica)]
    assert [a.deployment for a in starts] == ["solo"]
