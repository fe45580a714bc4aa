"""What each policy does with the same world."""

from __future__ import annotations

import pytest

from sllm.sim.policies import POLICIES


def waits(simulation):
    return [r.waited_s for r in sorted(simulation.ended, key=lambda r: r.number)]


def near_and_far(world, **near):
    """`x` is in the memory of `a`, where the only device is busy with `y` from 40 to 100; `b` is free."""
    models = [world.model("x", on="ab", keep_alive_s=0.0), world.model("y", on="a", keep_alive_s=0.0)]
    nodes = [world.node("a"), world.node("b")]
    return nodes, models, world.arrivals((0, "x", 1), (30, "y", 60), (50, "x", 5))


def test_locality_waits_where_the_checkpoint_is_in_memory_ours_loads_it_elsewhere(world):
    assert waits(world.run(*near_and_far(world), POLICIES["locality"]))[2] == 50 + 1
    assert waits(world.run(*near_and_far(world), POLICIES["ours"]))[2] == 10


def test_preemption_stops_what_runs_there_only_if_there_is_another_place(world):
    nodes, models, requests = near_and_far(world)
    simulation = world.run(nodes, models, requests, POLICIES["preemption"])
    assert waits(simulation)[2] == 1
    assert simulation.controller.stopped_busy == 1
    (victim,) = [r for r in simulation.ended if r.losses]
    assert victim.arrival.deployment == "y"
    assert victim.arrival.output_tokens == 60
    # From 50 until `x` has loaded and run, 56, and its device is free; then from memory again.
    assert victim.waited_s == 10 + 6 + 1

    nodes, models, requests = near_and_far(world)
    full = [*world.arrivals((0, "z", 300)), *requests]
    models.append(world.model("z", on="b"))
    simulation = world.run(nodes, models, full, POLICIES["preemption"])
    assert simulation.controller.stopped_busy == 0


def test_random_uses_every_node_that_has_room_ours_the_one_that_starts_soonest(world):
    def nodes_of(policy):
        """Where the checkpoint is asked for again, after it has been in the memory of `a`."""
        used = set()
        for seed in range(8):
            simulation = world.run(
                [world.node(name) for name in "abc"],
                [world.model(on="abc", keep_alive_s=0.0)],
                world.arrivals((0, "m", 1), (20, "m", 1)),
                POLICIES[policy],
                seed=seed,
            )
            used.add(tuple(waits(simulation)))
        return used

    assert nodes_of("ours") == {(10, 1)}
    assert nodes_of("random") == {(10, 1), (10, 10)}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_lets_idle_replicas_make_room(world, policy):
    models = [world.model("x", keep_alive_s=1e6), world.model("y", keep_alive_s=1e6)]
    requests = world.arrivals((0, "x", 1), (20, "y", 1), (40, "x", 1))
    assert waits(world.run([world.node()], models, requests, POLICIES[policy])) == [10, 10, 1]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_a_large_replica_the_devices_of_several_small_ones(world, policy):
    models = [world.model("x", keep_alive_s=1e6), world.model("y", keep_alive_s=1e6), world.model("z", devices=2)]
    requests = world.arrivals((0, "x", 1), (20, "y", 1), (40, "z", 1))
    assert waits(world.run([world.node(devices=2)], models, requests, POLICIES[policy])) == [10, 10, 10]
