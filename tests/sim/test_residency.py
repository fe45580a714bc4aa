"""Simulated nodes read ahead and take copies as the controller's rules say."""

from __future__ import annotations

from sllm.core.snapshot import Policy
from sllm.sim.request import Served
from sllm.sim.spec import Failure

GB = 10**9


def waits(simulation):
    return [request.waited_s for request in sorted(simulation.ended, key=lambda request: request.number)]


def test_what_is_popular_is_in_memory_again_when_a_restarted_node_is_asked_for_it(world):
    asked = world.arrivals((0, "m", 1), (20, "m", 1), (30, "m", 1), (90, "m", 1))
    failures = (Failure(node="a", at=50, for_s=5),)
    model = world.model(keep_alive_s=0.0)
    cold = world.run([world.node()], [model], asked, failures=failures)
    ahead = world.run([world.node()], [model], asked, failures=failures, policy=Policy(prefetch=True))
    assert (waits(cold)[3], waits(ahead)[3]) == (10, 1)
    assert ahead.controller.prefetches == 1


def test_a_start_goes_before_what_is_read_ahead_and_shares_it(world):
    models = [world.model("m", keep_alive_s=0.0), world.model("n", keep_alive_s=0.0)]
    asked = world.arrivals((0, "m", 1), (20, "m", 1), (30, "m", 1), (61, "n", 1), (64, "m", 1))
    failures = (Failure(node="a", at=50, for_s=5),)
    run = world.run([world.node(devices=2)], models, asked, failures=failures, policy=Policy(prefetch=True))
    # Reading ahead begins at 60, rests from 61 to 71 for n, and has 9 s left then.
    assert waits(run)[3:] == [10, 71 + 9 - 64]


def test_a_copy_is_made_where_there_is_none_and_is_started_from(world):
    nodes = [world.node("a"), world.node("b")]
    model = world.model(on=("a",), max_replicas=2, keep_alive_s=0.0)
    asked = world.arrivals(*[(at, "m", 1) for at in (0, 20, 25, 30, 35)], (60, "m", 50), (70, "m", 50))
    alone = world.run(nodes, [model], asked)
    spread = world.run(nodes, [model], asked, policy=Policy(max_copies=2))
    assert spread.controller.copies == 1
    assert spread.nodes["b"].report().checkpoints == spread.nodes["a"].report().checkpoints
    assert {r.served for r in alone.ended} == {Served.SSD, Served.DRAM, Served.WARM}
    assert [r.spec.deployment for r in alone.nodes["b"].replicas.values()] == []
    assert spread.controller.starts == alone.controller.starts + 1


def test_a_copy_is_lost_with_a_node_that_fails_meanwhile(world):
    nodes = [world.node("a"), world.node("b")]
    asked = world.arrivals(*[(at, "m", 1) for at in (0, 20, 25, 30, 35, 100)])
    failures = (Failure(node="b", at=43, for_s=5),)
    run = world.run(nodes, [world.model(on=("a",))], asked, failures=failures, policy=Policy(max_copies=2))
    assert run.controller.copies == 1
    assert run.nodes["b"].report().checkpoints == ()
