"""What the processes of a local cluster are told: their configurations, as values. It reads and writes nothing."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sllm.errors import CapacityExceeded, InvalidArgument

LOOPBACK = "127.0.0.1"
GRACE_S = 5.0
# Shares of the memory that is free when the cluster starts: the nodes' pools, and what their replicas may use.
_POOL_SHARE = 4
_DEVICE_SHARE = 2


class Engine(StrEnum):
    VLLM = "vllm"
    FAKE = "fake"


ROLES = ("controller", "gateway", "agent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One value of the configuration of every process of a role; `keys` is the way to it through the sections."""

    role: str
    keys: tuple[str, ...]
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The cluster that was asked for; port 0 means any free one. `settings` go over what each role is given."""

    nodes: int
    devices_per_node: int
    gateway_port: int
    controller_port: int
    engine: Engine
    state: Path
    settings: tuple[Setting, ...] = ()

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"node-{number}" for number in range(1, self.nodes + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to share out. `gpus` are UUIDs, none where the engine cannot use them."""

    cores: int
    free_bytes: int
    gpus: tuple[str, ...] = ()


def parse_setting(text: str) -> Setting:
    """Read ROLE.KEY=VALUE, where VALUE is TOML, or a text without quotes. Raises InvalidArgument."""
    path, equals, value = text.partition("=")
    role, *keys = path.strip().split(".")
    if not equals or role not in ROLES or not keys or not all(keys):
        raise InvalidArgument(
            f"{text!r} is no setting",
            hint=f"give ROLE.KEY=VALUE, as in controller.stable_after_s=30; ROLE is one of {', '.join(ROLES)}",
        )
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return Setting(role=role, keys=tuple(keys), value=parsed)


def overridden(config: dict[str, Any], settings: Iterable[Setting], role: str) -> dict[str, Any]:
    """Return a role's configuration with the settings that are for it. Raises InvalidArgument for a way through what
    is no section."""
    for setting in settings:
        if setting.role == role:
            config = _with(config, setting.keys, setting.value, setting)
    return config


def _with(section: dict[str, Any], keys: tuple[str, ...], value: Any, setting: Setting) -> dict[str, Any]:
    if len(keys) > 1:
        inner = section.get(keys[0], {})
        if not isinstance(inner, dict):
            raise InvalidArgument(f"{keys[0]!r} in {setting.role}.{'.'.join(setting.keys)} is no section")
        value = _with(inner, keys[1:], value, setting)
    return {**section, keys[0]: value}


def check_machine(wish: Wish, machine: Machine) -> None:
    """Raise CapacityExceeded if there are GPUs, but too few: two nodes must not share one."""
    needed = wish.nodes * wish.devices_per_node
    if machine.gpus and needed > len(machine.gpus):
        raise CapacityExceeded(
            f"{wish.nodes} nodes with {wish.devices_per_node} devices each need {needed} GPUs, "
            f"and this machine has {len(machine.gpus)}",
            hint="ask for less with --nodes and --devices-per-node",
        )


def controller_config(wish: Wish, listen: str) -> dict[str, Any]:
    return {
        "listen": listen,
        "state_dir": wish.state / "controller",
        "tls": _tls(wish, "controller"),
    }


def gateway_config(wish: Wish, listen: str, controller: str) -> dict[str, Any]:
    return {
        "listen": listen,
        "controller": controller,
        "state_dir": wish.state / "gateway",
        "allow_any_key": True,
        "tls": _tls(wish, "gateway"),
    }


def agent_config(wish: Wish, machine: Machine, index: int, controller: str) -> dict[str, Any]:
    """Return the configuration of node `index`, counted from 0."""
    name = wish.node_names[index]
    return {
        "name": name,
        "listen": f"{LOOPBACK}:0",
        "controller": controller,
        "state_dir": wish.state / name,
        "tls": _tls(wish, name),
        "devices": _devices(wish, machine, index),
        # Memory comes as it is used: a laptop has other uses for it.
        "store": {"dram_bytes": machine.free_bytes // _POOL_SHARE // wish.nodes, "prefault": False},
        # A clean stop leaves nothing, unlike that of a server's agent, whose engine hosts go on.
        "engine": {"kind": wish.engine.value, "grace_s": GRACE_S, "stop_with_agent": True},
    }


def _devices(wish: Wish, machine: Machine, index: int) -> dict[str, Any]:
    count = wish.devices_per_node
    if machine.gpus:
        return {"kind": "cuda", "uuids": list(machine.gpus[index * count : (index + 1) * count])}
    slots = wish.nodes * count
    return {
        "kind": "cpu",
        "cpu_slots": count,
        "cpu_threads": max(1, machine.cores // slots),
        "memory_bytes": machine.free_bytes // _DEVICE_SHARE // slots,
    }


def _tls(wish: Wish, name: str) -> dict[str, Path]:
    pki = wish.state / "pki"
    return {"ca": pki / "ca.pem", "certificate": pki / f"{name}.pem", "key": pki / f"{name}.key"}
