"""What the processes of a local cluster are told."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from sllm.cli import toml_text
from sllm.cli.local.cluster import check_settings
from sllm.cli.local.layout import (
    Engine,
    Machine,
    Wish,
    agent_config,
    check_machine,
    controller_config,
    gateway_config,
    overridden,
    parse_setting,
)
from sllm.config import AgentConfig, ControllerConfig, GatewayConfig, check
from sllm.errors import CapacityExceeded, InvalidArgument, InvalidConfiguration

WISH = Wish(nodes=2, devices_per_node=2, gateway_port=0, controller_port=0, engine=Engine.FAKE, state=Path("/state"))
MACHINE = Machine(cores=8, free_bytes=64 << 30)


def checked(values, model):
    return check(tomllib.loads(toml_text.dumps(values)), model, origin="test")


def test_all_configurations_are_valid_and_on_loopback_only():
    controller = checked(controller_config(WISH, "127.0.0.1:0"), ControllerConfig)
    gateway = checked(gateway_config(WISH, "127.0.0.1:0", "127.0.0.1:7700"), GatewayConfig)
    agent = checked(agent_config(WISH, MACHINE, 0, "127.0.0.1:7700"), AgentConfig)
    assert {config.listen for config in (controller, gateway, agent)} == {"127.0.0.1:0"}
    assert gateway.allow_any_key
    assert agent.engine.bind_host == "127.0.0.1"
    assert agent.engine.grace_s == 5
    assert agent.engine.stop_with_agent


def test_every_process_has_a_state_folder_and_a_key_of_its_own():
    configs = [
        controller_config(WISH, "127.0.0.1:0"),
        gateway_config(WISH, "127.0.0.1:0", "c:1"),
        *(agent_config(WISH, MACHINE, index, "c:1") for index in range(2)),
    ]
    assert len({config["state_dir"] for config in configs}) == 4
    assert len({config["tls"]["key"] for config in configs}) == 4


def test_cores_and_memory_are_shared_out():
    agents = [agent_config(WISH, MACHINE, index, "c:1") for index in range(2)]
    assert [agent["devices"]["cpu_threads"] for agent in agents] == [2, 2]
    assert sum(agent["store"]["dram_bytes"] for agent in agents) == 16 << 30
    assert sum(agent["devices"]["memory_bytes"] * 2 for agent in agents) == 32 << 30


def test_a_small_machine_still_has_a_thread_per_slot():
    assert agent_config(WISH, Machine(cores=1, free_bytes=1 << 30), 0, "c:1")["devices"]["cpu_threads"] == 1


def test_gpus_are_split_by_uuid_and_none_twice():
    machine = Machine(cores=8, free_bytes=64 << 30, gpus=("A", "B", "C", "D", "E"))
    check_machine(WISH, machine)
    agents = [agent_config(WISH, machine, index, "c:1")["devices"] for index in range(2)]
    assert agents == [{"kind": "cuda", "uuids": ["A", "B"]}, {"kind": "cuda", "uuids": ["C", "D"]}]


def test_too_few_gpus_are_refused_with_both_numbers():
    with pytest.raises(CapacityExceeded, match="need 4 GPUs, and this machine has 3"):
        check_machine(WISH, Machine(cores=8, free_bytes=1 << 30, gpus=("A", "B", "C")))


def test_no_gpus_at_all_means_cpu_slots():
    check_machine(WISH, MACHINE)
    assert agent_config(WISH, MACHINE, 0, "c:1")["devices"]["kind"] == "cpu"


def test_settings_go_over_what_a_role_is_given():
    settings = [
        parse_setting("agent.store.dram_bytes=5"),
        parse_setting("agent.name = x"),
        parse_setting("gateway.a=1"),
    ]
    given = {"name": "node-1", "store": {"dram_bytes": 1, "lock": True}}
    assert overridden(given, settings, "agent") == {"name": "x", "store": {"dram_bytes": 5, "lock": True}}
    assert given["store"]["dram_bytes"] == 1


@pytest.mark.parametrize("text", ["", "agent", "agent.x", "agent=1", "agent..x=1", "warm.x=1"])
def test_what_is_no_setting_is_refused(text):
    with pytest.raises(InvalidArgument):
        parse_setting(text)


@pytest.mark.parametrize("text", ["controller.nothing=1", "agent.store.dram_bytes=no", "gateway.queue_timeout_s=-1"])
def test_a_setting_that_its_role_would_refuse_is_refused_before_anything_starts(text):
    check_settings(WISH, MACHINE)
    with pytest.raises(InvalidConfiguration):
        check_settings(replace(WISH, settings=(parse_setting(text),)), MACHINE)
