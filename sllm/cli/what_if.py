"""`sllm simulate --from-cluster`: the live cluster as a scenario: what is to be different, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.cli.options import Where
from sllm.cli.session import ask
from sllm.errors import InvalidArgument

if TYPE_CHECKING:
    from sllm.core.description import ClusterDescription
    from sllm.core.ids import DeploymentName
    from sllm.sim.scenario import Scenario, WorkloadConfig
    from sllm.sim.spec import Arrival

REQUESTS = 200
TOKENS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Options of the command line. `scenario` has a workload only: nodes and models are the cluster's."""

    scenario: Path | None = None
    trace: Path | None = None
    rate_rps: float | None = None
    cv: float | None = None
    requests: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    deployments: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    token_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FromCluster:
    """A scenario that begins from a live cluster: its open requests go before those that are drawn."""

    scenario: Scenario
    told: ClusterDescription
    notes: tuple[str, ...]

    def begun(self, arrivals: list[Arrival]) -> list[Arrival]:
        from sllm.sim.live import open_requests

        return [*open_requests(self.told, self.scenario.cluster, arrivals), *arrivals]


def check_options(asked: Asked, *, from_cluster: bool) -> None:
    """Refuse what does not go together. Raises InvalidArgument."""
    if not from_cluster:
        if given := _given(asked, "rate_rps", "cv", "requests", "prompt_tokens", "output_tokens", "token_s"):
            raise InvalidArgument(f"{given} needs --from-cluster: a scenario says this itself")
        if given := _given(asked, "deployments", "added", "down"):
            raise InvalidArgument(f"{given} needs --from-cluster")
        if asked.scenario is None:
            raise InvalidArgument("what is to be simulated?", hint="give a SCENARIO.toml, or --from-cluster")
        return
    workload = ("rate_rps", "cv", "requests", "prompt_tokens", "output_tokens")
    given = _given(asked, *workload)
    if given and (asked.scenario is not None or asked.trace is not None):
        raise InvalidArgument(f"{given} and {asked.scenario or asked.trace} both say what is asked of the cluster")
    if asked.scenario is None and asked.trace is None and asked.rate_rps is None:
        raise InvalidArgument("what is asked of the cluster?", hint="give --rate, --trace, or a scenario's workload")
    if asked.token_s is not None and asked.token_s <= 0:
        raise InvalidArgument(f"--token-time {asked.token_s}: seconds, above 0, are needed")


def read_cluster(where: Where, asked: Asked) -> FromCluster:
    """Ask the controller, and make of its answer what is to be simulated. An error is printed and ends the command."""
    from sllm.cli.failures import reported
    from sllm.core.ids import node_name
    from sllm.rpc.control import Empty
    from sllm.sim.live import WhatIf, live_cluster
    from sllm.sim.scenario import Scenario, workload_of

    with reported(where.output):
        what_if = WhatIf(
            added=tuple(map(node_name, asked.added)), down=tuple(map(node_name, asked.down)), token_s=asked.token_s
        )
        workload = _workload(asked)
    told = ask(where, lambda client: client.describe_cluster(Empty()))
    with reported(where.output):
        live = live_cluster(told, what_if)
        folder = asked.scenario.parent if asked.scenario else Path()
        drawn = workload_of(workload, _deployments(told, asked.deployments), folder)
        return FromCluster(scenario=Scenario(cluster=live.cluster, workload=drawn), told=told, notes=live.notes)


_FLAGS = {
    "rate_rps": "--rate",
    "cv": "--cv",
    "requests": "--requests",
    "prompt_tokens": "--prompt-tokens",
    "output_tokens": "--output-tokens",
    "deployments": "--deployment",
    "added": "--add-node",
    "down": "--node-down",
    "token_s": "--token-time",
}


def _given(asked: Asked, *names: str) -> str:
    """The first of these options that was given; empty: none was."""
    return next((_FLAGS[name] for name in names if getattr(asked, name) not in (None, ())), "")


def _deployments(told: ClusterDescription, asked: tuple[str, ...]) -> list[DeploymentName]:
    known = [deployment.deployment.spec.name for deployment in told.deployments]
    for name in asked:
        if name not in known:
            raise InvalidArgument(f"the cluster has no deployment {name!r}", hint=f"there are {', '.join(known)}")
    return [name for name in known if not asked or name in asked]


def _workload(asked: Asked) -> WorkloadConfig:
    from sllm.config import check, load
    from sllm.sim.scenario import WorkloadConfig, replayed

    if asked.scenario is not None:
        config = load(asked.scenario, WorkloadConfig)
        return replayed(config, asked.trace) if asked.trace is not None else config
    if asked.trace is not None:
        arrivals: dict[str, Any] = {"kind": "trace", "file": asked.trace.absolute()}
        return check({"arrivals": arrivals}, WorkloadConfig, origin="--trace")
    arrivals = {"kind": "poisson", "rate_rps": asked.rate_rps, "requests": asked.requests or REQUESTS}
    if asked.cv is not None:
        arrivals |= {"kind": "gamma", "cv": asked.cv}
    lengths = {
        "kind": "constant",
        "prompt": TOKENS if asked.prompt_tokens is None else asked.prompt_tokens,
        "output": TOKENS if asked.output_tokens is None else asked.output_tokens,
    }
    return check({"arrivals": arrivals, "lengths": lengths}, WorkloadConfig, origin="the options")
