"""Scenario: a TOML file that describes a cluster, its models and what is asked of it (docs/simulation.md).

What is written in it is checked here and by `sllm.config`; what it means is in `sllm.sim.spec` and `sllm.sim.workload`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from sllm.config import Section, load
from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import DeploymentSpec
from sllm.core.device import DeviceKind
from sllm.core.ids import CheckpointName, DeploymentName, NodeName, checkpoint_name, node_name
from sllm.core.snapshot import Policy
from sllm.errors import InvalidConfiguration, SllmError
from sllm.sim.spec import Cluster, Failure, ModelSpec, NodeSpec, Timing
from sllm.sim.traces import read_lengths, read_trace
from sllm.sim.workload import Lengths, LogNormal, Renewal, Row, Workload

Name = TypeVar("Name")
Workloads = TypeVar("Workloads", bound="WorkloadConfig")


class NodeConfig(Section):
    """`count` nodes that are alike, called NAME-1, NAME-2, …; just NAME if it is one."""

    name: str = "node"
    count: int = Field(default=1, ge=1)
    devices: int = Field(ge=1)
    device_kind: Literal["cuda", "cpu"] = "cuda"
    device_memory_bytes: int = Field(gt=0)
    dram_bytes: int = Field(ge=0, description="the pool")
    ssd_bandwidth_bps: float = Field(gt=0, description="of the node: one checkpoint is read at a time")
    dram_bandwidth_bps: float = Field(gt=0, description="from the pool to each device")
    release_s: float = Field(default=0.1, ge=0, description="until a stopped replica's devices are free")
    ssd_bytes: int = Field(default=10**15, gt=0, description="of the disk: no more copies are made than fit")


class ModelConfig(Section):
    """`count` models that are alike, each with a checkpoint and a deployment of its own."""

    name: str
    count: int = Field(default=1, ge=1)
    size_bytes: int = Field(gt=0)
    copies: int | None = Field(default=None, ge=1, description="nodes with a copy on SSD, in turns; none given: all")
    max_model_len: int = Field(default=4096, ge=1)
    devices: int = Field(default=1, ge=1)
    min_replicas: int = Field(default=0, ge=0)
    max_replicas: int = Field(default=4, ge=1)
    target_concurrency: int = Field(default=8, ge=1)
    keep_alive_s: float = Field(default=60.0, ge=0)
    fork_s: float = Field(default=0.0, ge=0, description="of a start, while its bytes come")
    build_s: float = Field(ge=0, description="of a start, when all of its bytes have come")
    rest_s: float | None = Field(default=None, ge=0, description="if it is built while they come: when the last has")
    prefill_token_s: float = Field(ge=0)
    token_s: float = Field(gt=0, description="per output token")
    recompute_token_s: float = Field(default=0.0, ge=0, description="per token of a request that lost its replica")
    recompute_s: float = Field(default=0.0, ge=0)


class ZipfConfig(Section):
    """The chance of the n-th most popular model is proportional to 1 / n^exponent."""

    kind: Literal["zipf"]
    exponent: float = Field(default=0.9, ge=0)


class UniformConfig(Section):
    kind: Literal["uniform"]


class PoissonConfig(Section):
    kind: Literal["poisson"]
    rate_rps: float = Field(gt=0)
    requests: int = Field(ge=1)


class GammaConfig(Section):
    """Bursty: gaps with coefficient of variation `cv`."""

    kind: Literal["gamma"]
    rate_rps: float = Field(gt=0)
    cv: float = Field(gt=0)
    requests: int = Field(ge=1)


class TraceConfig(Section):
    """A file of the Azure LLM inference traces: CSV with TIMESTAMP, ContextTokens and GeneratedTokens."""

    kind: Literal["trace"]
    file: Path
    requests: int | None = Field(default=None, ge=1, description="the first ones; none given: all")
    speed: float = Field(default=1.0, gt=0, description="so many times as fast as recorded")


class LogNormalConfig(Section):
    median: float = Field(gt=0)
    sigma: float = Field(ge=0, description="of the logarithm")
    least: int = Field(default=1, ge=1)
    most: int = Field(default=100_000, ge=1)


class ConstantLengths(Section):
    kind: Literal["constant"]
    prompt: int = Field(ge=0)
    output: int = Field(ge=1)


class LogNormalLengths(Section):
    kind: Literal["lognormal"]
    prompt: LogNormalConfig
    output: LogNormalConfig


class FileLengths(Section):
    """Pairs of a CSV file, drawn with equal chances."""

    kind: Literal["file"]
    file: Path
    prompt_column: str
    output_column: str


class NoiseConfig(Section):
    """Coefficients of variation of what loads take, and of how long requests compute."""

    load_cv: float = Field(default=0.0, ge=0, le=2)
    pace_cv: float = Field(default=0.0, ge=0, le=2)


class FailureConfig(Section):
    node: str
    at_s: float = Field(ge=0)
    for_s: float | None = Field(default=None, gt=0, description="none given: it stays away")


class LimitsConfig(Section):
    """As in the configuration of gateways and of the controller (docs/configuration.md)."""

    queue_timeout_s: float = Field(default=300.0, gt=0)
    queue_per_deployment: int = Field(default=256, ge=1)
    silence_s: float = Field(default=8.0, ge=0)
    heartbeat_s: float = Field(default=2.0, gt=0)
    suspect_s: float = Field(default=6.0, gt=0)
    dead_s: float = Field(default=15.0, gt=0)
    drain_s: float = Field(default=60.0, ge=0)
    min_loaded_s: float = Field(default=1.0, ge=0)
    swap_hold_s: float = Field(default=30.0, ge=0)


class ResidencyConfig(Section):
    """As in the configuration of the controller (docs/configuration.md)."""

    prefetch: bool = False
    max_copies: int = Field(default=1, ge=1)


ArrivalsConfig = Annotated[PoissonConfig | GammaConfig | TraceConfig, Field(discriminator="kind")]
LengthsConfig = Annotated[ConstantLengths | LogNormalLengths | FileLengths, Field(discriminator="kind")]


class WorkloadConfig(Section):
    """What is asked of a cluster, whichever that is."""

    popularity: Annotated[ZipfConfig | UniformConfig, Field(discriminator="kind")] = UniformConfig(kind="uniform")
    arrivals: ArrivalsConfig
    lengths: LengthsConfig | None = None
    noise: NoiseConfig = NoiseConfig()

    @model_validator(mode="after")
    def _has_lengths(self) -> Self:
        traced = isinstance(self.arrivals, TraceConfig)
        if traced and self.lengths is not None:
            raise ValueError("a trace has lengths of its own: leave [lengths] out")
        if not traced and self.lengths is None:
            raise ValueError(f"[lengths] is needed where arrivals are {self.arrivals.kind!r}")
        return self


class ScenarioConfig(WorkloadConfig):
    nodes: list[NodeConfig] = Field(min_length=1)
    models: list[ModelConfig] = Field(min_length=1)
    failures: list[FailureConfig] = Field(default_factory=list)
    limits: LimitsConfig = LimitsConfig()
    residency: ResidencyConfig = ResidencyConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    cluster: Cluster
    workload: Workload


def read_scenario(path: Path, *, trace: Path | None = None) -> Scenario:
    """Read a scenario and the files it names, whose paths are relative to its own folder. `trace` replaces its arrivals
    and lengths. Raises InvalidConfiguration with the file and the key."""
    config = load(path, ScenarioConfig)
    if trace is not None:
        config = replayed(config, trace)
    try:
        return scenario_of(config, path.parent)
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"{path}: {error.message}", hint=error.hint) from error


def scenario_of(config: ScenarioConfig, folder: Path) -> Scenario:
    """What a configuration means. Files that it names are in `folder`. Raises InvalidConfiguration with the key."""
    names = [DeploymentName(name) for group in config.models for name in _names(group.name, group.count)]
    return Scenario(cluster=_cluster(config), workload=workload_of(config, names, folder))


def replayed(config: Workloads, trace: Path) -> Workloads:
    """Another trace in place of what the scenario has; of one that has a trace, as many requests at the same speed."""
    arrivals, file = config.arrivals, trace.absolute()
    if isinstance(arrivals, TraceConfig):
        return config.model_copy(update={"arrivals": arrivals.model_copy(update={"file": file})})
    return config.model_copy(update={"arrivals": TraceConfig(kind="trace", file=file)})


def _cluster(config: ScenarioConfig) -> Cluster:
    nodes = tuple(spec for number, group in enumerate(config.nodes) for spec in _nodes(group, f"nodes.{number}"))
    _distinct("nodes", (node.name for node in nodes))
    models = tuple(
        spec for number, group in enumerate(config.models) for spec in _models(group, nodes, f"models.{number}")
    )
    _distinct("models", (model.deployment.name for model in models))
    limits = config.limits
    return Cluster(
        nodes=nodes,
        models=models,
        failures=_failures(config.failures, {node.name for node in nodes}),
        policy=Policy(
            heartbeat_s=limits.heartbeat_s,
            suspect_s=limits.suspect_s,
            dead_s=limits.dead_s,
            drain_s=limits.drain_s,
            min_loaded_s=limits.min_loaded_s,
            swap_hold_s=limits.swap_hold_s,
            prefetch=config.residency.prefetch,
            max_copies=config.residency.max_copies,
        ),
        timeout_s=limits.queue_timeout_s,
        queue_length=limits.queue_per_deployment,
        silence_s=limits.silence_s,
        load_cv=config.noise.load_cv,
    )


def _nodes(group: NodeConfig, place: str) -> Iterable[NodeSpec]:
    for name in _names(group.name, group.count):
        yield NodeSpec(
            name=_checked(place, node_name, name),
            devices=group.devices,
            device_kind=DeviceKind(group.device_kind),
            device_memory_bytes=group.device_memory_bytes,
            dram_bytes=group.dram_bytes,
            ssd_bandwidth_bps=group.ssd_bandwidth_bps,
            dram_bandwidth_bps=group.dram_bandwidth_bps,
            release_s=group.release_s,
            ssd_bytes=group.ssd_bytes,
        )


def _models(group: ModelConfig, nodes: tuple[NodeSpec, ...], place: str) -> Iterable[ModelSpec]:
    copies = len(nodes) if group.copies is None else group.copies
    if copies > len(nodes):
        raise InvalidConfiguration(f"{place}.copies: {copies} copies, and there are {len(nodes)} nodes")
    device_bytes = -(-group.size_bytes // group.devices)
    if not any(node.devices >= group.devices and node.device_memory_bytes >= device_bytes for node in nodes):
        raise InvalidConfiguration(
            f"{place}: no node has {group.devices} devices with {device_bytes} bytes each, so it could never run"
        )
    for number, name in enumerate(_names(group.name, group.count)):
        checkpoint = _checked(place, checkpoint_name, name)
        yield ModelSpec(
            deployment=_deployment(group, checkpoint, place),
            checkpoint=Checkpoint(
                name=checkpoint,
                digest=f"simulated:{name}",
                size_bytes=group.size_bytes,
                architecture="simulated",
                dtype="float16",
                tensor_count=1,
                max_model_len=group.max_model_len,
                source=f"simulated:{name}",
            ),
            nodes=tuple(nodes[(number + turn) % len(nodes)].name for turn in range(copies)),
            timing=Timing(
                fork_s=group.fork_s,
                build_s=group.build_s,
                rest_s=group.rest_s,
                prefill_token_s=group.prefill_token_s,
                token_s=group.token_s,
                recompute_token_s=group.recompute_token_s,
                recompute_s=group.recompute_s,
            ),
        )


def _deployment(group: ModelConfig, name: CheckpointName, place: str) -> DeploymentSpec:
    try:
        return DeploymentSpec(
            name=DeploymentName(name),
            checkpoint=name,
            min_replicas=group.min_replicas,
            max_replicas=group.max_replicas,
            devices=group.devices,
            keep_alive_s=group.keep_alive_s,
            target_concurrency=group.target_concurrency,
        )
    except SllmError as error:
        raise InvalidConfiguration(f"{place}: {error.message}", hint=error.hint) from error


def _failures(given: list[FailureConfig], names: set[NodeName]) -> tuple[Failure, ...]:
    away: dict[str, float] = {}
    found = sorted(enumerate(given), key=lambda entry: entry[1].at_s)
    for number, failure in found:
        place = f"failures.{number}"
        if failure.node not in names:
            known = ", ".join(sorted(names)[:4])
            raise InvalidConfiguration(f"{place}.node: there is no node {failure.node!r}", hint=f"there are {known}")
        if failure.at_s <= away.get(failure.node, -1.0):
            raise InvalidConfiguration(f"{place}.at_s: {failure.node!r} has failed before, and is not back by then")
        away[failure.node] = float("inf") if failure.for_s is None else failure.at_s + failure.for_s
    return tuple(Failure(node=NodeName(f.node), at=f.at_s, for_s=f.for_s) for _, f in found)


def workload_of(config: WorkloadConfig, models: Sequence[DeploymentName], folder: Path) -> Workload:
    """What is asked of these models. Files that it names are in `folder`. Raises InvalidConfiguration."""
    popularity = config.popularity
    return Workload(
        arrivals=_arrivals(config, folder),
        models=models,
        exponent=popularity.exponent if isinstance(popularity, ZipfConfig) else 0.0,
        pace_cv=config.noise.pace_cv,
    )


def _arrivals(config: WorkloadConfig, folder: Path) -> Renewal | list[Row]:
    arrivals = config.arrivals
    if isinstance(arrivals, TraceConfig):
        rows = read_trace(folder / arrivals.file, requests=arrivals.requests, speed=arrivals.speed)
        if not rows:
            raise InvalidConfiguration(f"{arrivals.file} has no requests")
        return rows
    assert config.lengths is not None  # as checked
    return Renewal(
        requests=arrivals.requests,
        rate_rps=arrivals.rate_rps,
        cv=arrivals.cv if isinstance(arrivals, GammaConfig) else 1.0,
        lengths=_lengths(config.lengths, folder),
    )


def _lengths(config: ConstantLengths | LogNormalLengths | FileLengths, folder: Path) -> Lengths:
    if isinstance(config, FileLengths):
        columns = {"prompt_column": config.prompt_column, "output_column": config.output_column}
        pairs = read_lengths(folder / config.file, **columns)
        return lambda rng: rng.choice(pairs)
    if isinstance(config, LogNormalLengths):
        prompt, output = _law(config.prompt), _law(config.output)
        return lambda rng: (prompt.draw(rng), output.draw(rng))
    constant = (config.prompt, config.output)
    return lambda rng: constant


def _law(config: LogNormalConfig) -> LogNormal:
    return LogNormal(median=config.median, sigma=config.sigma, least=config.least, most=config.most)


def _checked(place: str, check: Callable[[str], Name], value: str) -> Name:
    try:
        return check(value)
    except SllmError as error:
        raise InvalidConfiguration(f"{place}.name: {error.message}", hint=error.hint) from error


def _names(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}-{number + 1}" for number in range(count)]


def _distinct(place: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidConfiguration(f"{place}: the name {twice[0]!r} is given twice")
