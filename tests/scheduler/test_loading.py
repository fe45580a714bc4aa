"""What is read on a node before a new load's turn comes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState, StartPhase
from sllm.core.residency import ResidencyState, Tier
from sllm.core.snapshot import Intent
from sllm.core.startup import Learnt
from sllm.scheduler.loading import LoadingQueues, Turn

STARTING = ReplicaState.STARTING


@pytest.fixture
def world(make):
    """A node that holds `m` (1000 bytes), `n` (300) and `o` (50) on SSD, and starts of them."""

    def holding(**in_memory: ResidencyState):
        sizes = {"m": 1000, "n": 300, "o": 50}
        held = [replace(make.residency(d), size_bytes=size) for d, size in sizes.items()]
        held += [make.residency(d, Tier.DRAM, state) for d, state in in_memory.items()]
        view = make.node("a")
        return replace(view, report=replace(view.report, residencies=tuple(held)))

    def start(name: str, digest: str, number: int, **fields):
        status = {f: fields.pop(f) for f in ("phase", "progress") if f in fields}
        replica = make.replica(name, state=STARTING, generation=number, **fields)
        spec = replace(replica.spec, digest=digest)
        return replace(replica, spec=spec, status=replace(replica.status, spec=spec, **status))

    def queues(*replicas, node=None, **fields):
        return LoadingQueues(make.snapshot(nodes=[node or holding()], replicas=replicas, **fields))

    return SimpleNamespace(holding=holding, start=start, queues=queues)


def turn(queues, node, digest="o", priority=Priority.REQUEST):
    return queues.turn(node, digest, priority)


def test_an_idle_node_reads_at_once(world):
    assert turn(world.queues(), world.holding()) == Turn(size_bytes=50, ahead_bytes=0)


def test_what_is_in_memory_is_not_read_and_waits_for_nobody(world):
    node = world.holding(o=ResidencyState.READY)
    assert turn(world.queues(world.start("x", "m", 1), node=node), node) == Turn(size_bytes=0, ahead_bytes=0)


@pytest.mark.parametrize(
    ("fields", "ahead_bytes"),
    [
        ({}, 1000),
        ({"phase": StartPhase.FORKING}, 1000),
        ({"phase": StartPhase.LOADING, "progress": 0.75}, 250),
        ({"phase": StartPhase.BUILDING}, 0),
        ({"intent": Intent.STOP}, 0),
        ({"priority": Priority.PREWARM}, 0),
    ],
)
def test_only_what_is_still_to_come_of_starts_that_go_first_is_waited_for(world, fields, ahead_bytes):
    queues = world.queues(world.start("x", "m", 1, **fields))
    assert turn(queues, world.holding()).ahead_bytes == ahead_bytes


def test_what_is_started_ahead_of_requests_waits_for_both(world):
    queues = world.queues(world.start("x", "m", 1, priority=Priority.PREWARM), world.start("y", "n", 2))
    assert turn(queues, world.holding(), priority=Priority.PREWARM).ahead_bytes == 1300
    assert turn(queues, world.holding(), priority=Priority.REQUEST).ahead_bytes == 300


def test_a_start_that_no_report_has_shown_counts_too(world):
    unseen = replace(world.start("x", "m", 1), status=None)
    assert turn(world.queues(unseen), world.holding()).ahead_bytes == 1000


def test_a_load_that_many_wait_for_is_counted_once(world):
    further = world.start("y", "m", 2, phase=StartPhase.LOADING, progress=0.5)
    assert turn(world.queues(world.start("x", "m", 1), further), world.holding()).ahead_bytes == 500


def test_a_checkpoint_that_is_being_read_has_its_place_already(world):
    own = world.start("x", "m", 2, phase=StartPhase.LOADING, progress=0.25)
    queues = world.queues(world.start("w", "n", 1), own, world.start("y", "o", 3))
    assert turn(queues, world.holding(), "m") == Turn(size_bytes=750, ahead_bytes=300)


def test_a_request_raises_the_load_that_it_needs_over_others(world):
    queues = world.queues(
        world.start("w", "n", 1, priority=Priority.PREWARM), world.start("x", "m", 2, priority=Priority.PREWARM)
    )
    assert turn(queues, world.holding(), "m", Priority.PREWARM).ahead_bytes == 300
    assert turn(queues, world.holding(), "m", Priority.REQUEST).ahead_bytes == 0


def test_what_is_planned_takes_its_turn(world):
    queues, node = world.queues(world.start("x", "m", 7)), world.holding()
    queues.add(node, "n", Priority.REQUEST)
    assert turn(queues, node).ahead_bytes == 1300
    assert turn(queues, node, "n") == Turn(size_bytes=300, ahead_bytes=1000)


def test_a_load_has_the_size_of_the_last_one_if_its_layout_differs(world):
    learnt = Learnt(load_bytes={("a", "o"): 70})
    assert turn(world.queues(learnt=learnt), world.holding()).size_bytes == 70
