"""Two models that share a device: what gathering requests before a swap is worth, by the scenario that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllm.config import load
from sllm.sim.policies import POLICIES
from sllm.sim.result import result_of
from sllm.sim.scenario import ScenarioConfig, scenario_of
from sllm.sim.simulation import Simulation
from sllm.sim.workload import generate

SCENARIO = Path(__file__).parents[2] / "examples/scenarios/alternating.toml"


def result(hold_s, seed):
    config = load(SCENARIO, ScenarioConfig)
    limits = config.limits.model_copy(update={"swap_hold_s": hold_s})
    scenario = scenario_of(config.model_copy(update={"limits": limits}), SCENARIO.parent)
    simulation = Simulation(scenario.cluster, generate(scenario.workload, seed), POLICIES["ours"], seed=seed)
    simulation.run()
    return result_of(simulation, policy="ours", seed=seed)


@pytest.mark.parametrize("seed", [1, 2])
def test_two_models_that_alternate_swap_less_often_and_wait_less_on_the_whole(seed):
    at_once, gathered = result(0.0, seed), result(30.0, seed)
    assert gathered.starts < 0.75 * at_once.starts
    assert gathered.mean_s < 0.95 * at_once.mean_s
    assert gathered.timeouts == gathered.refused == 0
