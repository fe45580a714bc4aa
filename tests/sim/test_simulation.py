"""What happens to requests in small worlds whose times can be counted by hand."""

from __future__ import annotations

import pytest

from sllm.sim.request import Outcome, Served
from sllm.sim.spec import Failure, Timing


def ended(simulation):
    return sorted(simulation.ended, key=lambda request: request.number)


def waits(simulation):
    return [request.waited_s for request in ended(simulation)]


def kinds(simulation):
    return [request.served for request in ended(simulation)]


def test_a_cold_request_waits_for_the_bytes_and_the_start(world):
    model = world.model(timing=Timing(fork_s=0.3, build_s=0.5, token_s=1.0))
    simulation = world.run([world.node()], [model], world.arrivals((0, "m", 5)))
    assert waits(simulation) == [10.5]
    assert kinds(simulation) == [Served.SSD]
    assert simulation.events.now == 15.5


@pytest.mark.parametrize(("tier", "again_s"), [("SSD", 10.5), ("DRAM", 0.3 + 1 + 0.5)])
def test_the_phases_of_a_start_are_reported_and_add_up(world, tier, again_s):
    timing = Timing(fork_s=0.3, build_s=0.5, token_s=1.0)
    dram_bytes = 0 if tier == "SSD" else 20 * 10**9
    asked = world.arrivals((0, "m", 1), (100, "m", 1))
    simulation = world.run([world.node(dram_bytes=dram_bytes)], [world.model(timing=timing, keep_alive_s=1.0)], asked)
    (status,) = simulation.nodes["a"].report().replicas
    phases_s = {"SSD": [0, 0.3, 9.7, 0.5], "DRAM": [0, 0.3, 0, 1.5]}[tier]
    assert list(status.phases_s.values()) == pytest.approx(phases_s)
    assert list(status.phases_s) == ["queued", "forking", "loading", "building"]
    assert waits(simulation)[1] == pytest.approx(again_s)
    assert status.ready_at - status.started_at == pytest.approx(again_s)


def test_a_second_request_finds_the_replica_warm_and_after_the_keep_alive_the_checkpoint_in_memory(world):
    model = world.model(keep_alive_s=20.0)
    simulation = world.run([world.node()], [model], world.arrivals((0, "m", 5), (30, "m", 5), (90, "m", 5)))
    assert waits(simulation) == [10, 0, 1]
    assert kinds(simulation) == [Served.SSD, Served.WARM, Served.DRAM]
    # From 0 to 55 (a keep-alive after the second request), and from 90 on.
    assert simulation.device_s() == 55 + 6


def test_loads_of_a_node_go_one_after_another_and_those_of_memory_beside_them(world):
    models = [world.model(name) for name in "xyz"]
    node = world.node(devices=3)
    simulation = world.run([node], models, world.arrivals((0, "x", 1), (0, "y", 1), (5, "z", 1)))
    assert waits(simulation) == [10, 20, 25]
    models = [world.model(name, keep_alive_s=0.0) for name in "xy"]
    simulation = world.run([node], models, world.arrivals((0, "x", 1), (20, "y", 1), (21, "x", 1)))
    assert waits(simulation) == [10, 10, 1]


def test_two_starts_of_a_checkpoint_on_a_node_share_its_load(world):
    simulation = world.run(
        [world.node(devices=2)], [world.model(max_replicas=2)], world.arrivals((0, "m", 50), (4, "m", 50))
    )
    assert waits(simulation) == [10, 6]
    assert simulation.controller.starts == 2


def test_what_a_request_waits_for_interrupts_what_is_read_ahead(world):
    models = [world.model("ahead", min_replicas=1), world.model("asked")]
    simulation = world.run(
        [world.node(devices=2)], models, world.arrivals((3, "asked", 1), (14, "ahead", 1), (30, "ahead", 1))
    )
    assert waits(simulation) == [10, 6, 0]


def test_a_request_that_comes_to_wait_for_what_is_read_ahead_raises_it(world):
    models = [world.model("ahead", min_replicas=1), world.model("asked")]
    simulation = world.run([world.node(devices=2)], models, world.arrivals((1, "ahead", 1), (3, "asked", 1)))
    assert waits(simulation) == [9, 17]


def test_a_pool_that_is_full_lets_the_less_worthy_go(world):
    models = [world.model(name, keep_alive_s=0.0) for name in "xyz"]
    node = world.node(dram_bytes=25 * 10**9)
    often = [(at, "x", 1) for at in (0, 20, 25, 30, 35, 40)]
    asked = [*often, (45, "y", 1), (60, "z", 1), (75, "x", 1), (80, "y", 1)]
    simulation = world.run([node], models, world.arrivals(*asked))
    assert waits(simulation) == [10, 1, 1, 1, 1, 1, 10, 10, 1, 10]


def test_a_checkpoint_larger_than_the_pool_streams_through(world):
    node = world.node(dram_bytes=5 * 10**9)
    simulation = world.run([node], [world.model(keep_alive_s=0.0)], world.arrivals((0, "m", 1), (20, "m", 1)))
    assert waits(simulation) == [10, 10]


def test_an_idle_replica_makes_room_for_a_request_that_waits(world):
    models = [world.model("x", keep_alive_s=1e6), world.model("y")]
    simulation = world.run([world.node(release_s=2.0)], models, world.arrivals((0, "x", 5), (20, "y", 5)))
    assert waits(simulation) == [10, 12]


def test_a_request_that_waits_too_long_is_given_up_and_one_too_many_refused(world):
    models = [world.model("x"), world.model("y")]
    asked = world.arrivals((0, "x", 100), (20, "y", 1), (21, "y", 1), (22, "y", 1))
    simulation = world.run([world.node()], models, asked, timeout_s=30.0, queue_length=2)
    outcomes = [request.outcome for request in ended(simulation)]
    assert outcomes == [Outcome.SERVED, Outcome.TIMED_OUT, Outcome.TIMED_OUT, Outcome.REFUSED]
    assert waits(simulation)[1:3] == [30, 30]


@pytest.mark.parametrize(("for_s", "waited_s"), [(None, 8 + 10 + 3), (4.0, 4 + 10 + 3)])
def test_requests_of_a_lost_node_go_on_elsewhere_with_the_tokens_that_they_had(world, for_s, waited_s):
    """It has 100 + 20 tokens when its node goes, which are computed again in 3 s."""
    timing = Timing(token_s=1.0, recompute_token_s=0.025)
    model = world.model(on="ab", timing=timing, max_replicas=1)
    simulation = world.run(
        [world.node("a"), world.node("b")],
        [model],
        world.arrivals((0, "m", 50)),
        failures=(Failure(node="a", at=30.0, for_s=for_s),),
    )
    (request,) = simulation.ended
    assert request.outcome is Outcome.SERVED
    assert request.losses == 1
    # If the node stays away, the replica is placed elsewhere when it is dead: 15 s after it was last heard of.
    dead_s = 0 if for_s else 15 - 8
    assert request.waited_s == pytest.approx(10 + waited_s + dead_s)
    assert simulation.events.now == pytest.approx(30 + waited_s + dead_s + 30)


def test_a_node_that_comes_back_has_lost_its_memory_and_kept_its_ssd(world):
    asked = world.arrivals((0, "m", 1), (100, "m", 1), (200, "m", 1))
    model = world.model(keep_alive_s=10.0)
    simulation = world.run([world.node()], [model], asked, failures=(Failure(node="a", at=50.0, for_s=10.0),))
    assert waits(simulation) == [10, 10, 1]


def test_a_node_that_does_not_answer_is_avoided(world):
    """A start is sent to it before it is suspect; the next goes to the other node after a heartbeat."""
    nodes = [world.node("a"), world.node("b")]
    asked = world.arrivals((51, "m", 1))
    simulation = world.run(
        nodes, [world.model(on="ab")], asked, failures=(Failure(node="a", at=50.0),), timeout_s=100.0
    )
    assert waits(simulation) == [12]


def test_a_replica_that_fails_while_it_drains_or_loads_is_no_trouble_later(world):
    models = [world.model("x", on="ab"), world.model("y", on="ab")]
    asked = world.arrivals((0, "x", 30), (1, "y", 30), (2, "x", 5), (40, "y", 5))
    for at in (0.5, 5.0, 10.0, 25.0, 41.0):
        failures = (Failure(node="a", at=at, for_s=3.0),)
        simulation = world.run([world.node("a"), world.node("b")], models, asked, failures=failures)
        assert [request.outcome for request in ended(simulation)] == [Outcome.SERVED] * 4
