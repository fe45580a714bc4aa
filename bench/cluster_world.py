"""The clusters and workloads of the paper's evaluation (OSDI'24, §7.1), as far as they are published.

4 servers of 4 A40 (48 GB); OPT-6.7B, 13B and 30B as 32, 16 and 8 models. Assumed, because it is not published or not
freely: how long requests of ShareGPT are (a log-normal law), popularity (Zipf, 0.9), what a token takes of the larger
models (their weights over the bandwidth of an A40's memory, as measured of the smallest), keep-alive of one load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import DeploymentSpec
from sllm.core.device import DeviceKind
from sllm.core.ids import CheckpointName, DeploymentName, NodeName
from sllm.core.residency import Tier
from sllm.core.startup import Learnt, Level, StartTimes
from sllm.sim.scenario import Scenario
from sllm.sim.spec import Arrival, Cluster, ModelSpec, NodeSpec, Timing
from sllm.sim.traces import read_lengths
from sllm.sim.workload import Lengths, LogNormal, Renewal, Workload

GB = 10**9
SERVERS, DEVICES = 4, 4
SSD_BPS, LINK_BPS = 5.0 * GB, 24.0 * GB  # of the paper's servers: RAID of NVMe, PCIe 4.0 x16
POOL_BYTES = 160 * GB
BUILD_S = 0.1
QUESTION, ANSWER = "q_tok_est", "a_tok_est"


@dataclass(frozen=True, slots=True)
class Model:
    """One size of OPT: so many models of it, `devices` for a replica of each; `token_s` is assumed but of the first."""

    count: int
    size_bytes: int
    devices: int
    token_s: float


MODELS = {
    "opt-6.7b": Model(32, 13_300_000_000, 1, 0.028),
    "opt-13b": Model(16, 26_000_000_000, 1, 0.055),
    "opt-30b": Model(8, 60_000_000_000, 2, 0.063),
}
ASSUMED_LENGTHS = {
    "gsm8k": (LogNormal(median=54, sigma=0.40, least=8), LogNormal(median=83, sigma=0.43, least=8)),
    "sharegpt": (
        LogNormal(median=85, sigma=1.15, least=4, most=1024),
        LogNormal(median=235, sigma=0.95, least=4, most=1024),
    ),
}


@dataclass(frozen=True, slots=True)
class Configuration:
    """One point of the sweep. `cv` is of the gaps between requests (1: Poisson), `copies` are of each checkpoint."""

    model: str
    data: str
    rps: float
    cv: float = 1.0
    copies: int = 4

    @property
    def name(self) -> str:
        return f"{self.model} {self.data} rps={self.rps:g} cv={self.cv:g} copies={self.copies}"


def scenario(of: Configuration, requests: int, traces: Path) -> Scenario:
    size = MODELS[of.model]
    names = [DeploymentName(f"{of.model}-{number + 1}") for number in range(size.count)]
    nodes = tuple(_node(f"server-{number + 1}") for number in range(SERVERS))
    models = tuple(_model(name, size, nodes, number, of.copies) for number, name in enumerate(names))
    arrivals = Renewal(requests=requests, rate_rps=of.rps, lengths=lengths(of.data, traces), cv=of.cv)
    return Scenario(
        # Noise of loads as of 30 cold loads of Qwen3-32B on an H100, measured by the paper's authors.
        cluster=Cluster(nodes=nodes, models=models, load_cv=0.06),
        workload=Workload(arrivals=arrivals, models=names, exponent=0.9, pace_cv=0.02),
    )


def lengths(data: str, traces: Path) -> Lengths:
    """`gsm8k` as its rows were counted (roughly: by no model's tokenizer), if they are there; else an assumed law,
    which has a quarter more tokens in its answers: tokenizers take numbers apart."""
    table = traces / "gsm8k" / "lengths_test.csv"
    if data == "gsm8k" and table.is_file():
        pairs = read_lengths(table, prompt_column=QUESTION, output_column=ANSWER)
        return lambda rng: rng.choice(pairs)
    prompt, output = ASSUMED_LENGTHS[data.removesuffix("-law")]
    return lambda rng: (prompt.draw(rng), output.draw(rng))


def _node(name: str) -> NodeSpec:
    return NodeSpec(
        name=NodeName(name),
        devices=DEVICES,
        device_memory_bytes=48 * GB,
        dram_bytes=POOL_BYTES,
        ssd_bandwidth_bps=SSD_BPS,
        dram_bandwidth_bps=LINK_BPS,
        release_s=0.1,
    )


def _model(name: DeploymentName, size: Model, nodes: tuple[NodeSpec, ...], number: int, copies: int) -> ModelSpec:
    return ModelSpec(
        deployment=DeploymentSpec(
            name=name,
            checkpoint=CheckpointName(name),
            max_replicas=4,
            devices=size.devices,
            target_concurrency=1,  # a request wants its own devices; up to 4 share them until it has
            keep_alive_s=size.size_bytes / SSD_BPS,
        ),
        checkpoint=Checkpoint(
            name=CheckpointName(name),
            digest=f"simulated:{name}",
            size_bytes=size.size_bytes,
            architecture="simulated",
            dtype="float16",
            tensor_count=1,
            max_model_len=2048,
        ),
        nodes=tuple(nodes[(number + turn) % len(nodes)].name for turn in range(copies)),
        timing=Timing(
            build_s=BUILD_S,
            prefill_token_s=0.0002,
            token_s=size.token_s,
            recompute_token_s=size.token_s / 10,  # a tenth of what generating them takes (paper §4)
            recompute_s=0.05,
        ),
    )


# -- tiny clusters, small enough for an exact optimum

REGIMES = {"light": (0.3, 2.5), "medium": (0.6, 2.5), "heavy": (1.0, 2.5), "long requests": (0.3, 9.0)}
"""Requests per second, and the median of what one takes, in seconds."""


def tiny(regime: str, seed: int) -> tuple[Cluster, list[Arrival]]:
    """2 or 3 servers of one device, 4 models, each on the SSD of two servers, in the memory of one; 6 requests.

    What loads and starts take is known from the first instant, as to a cluster that has run for a while; what comes,
    and how long it takes, is not.
    """
    rps, median_s = REGIMES[regime]
    rng = Random(f"{regime}: {seed}")
    nodes = tuple(replace(_node(f"server-{n + 1}"), devices=1, release_s=0.0) for n in range(rng.choice([2, 3])))
    models = []
    for number in range(4):
        model = _model(DeploymentName(f"m{number}"), MODELS["opt-6.7b"], nodes, number, 2)
        models.append(replace(model, deployment=replace(model.deployment, max_replicas=1)))
    homes = {model.checkpoint.digest: rng.choice(model.nodes) for model in models}
    nodes = tuple(replace(n, in_memory=tuple(d for d, home in homes.items() if home == n.name)) for n in nodes)
    cluster = Cluster(nodes=nodes, models=tuple(models), known=_known(nodes, models))
    at, arrivals = 0.0, []
    for _ in range(6):
        at += rng.expovariate(rps)
        (model,) = rng.choices(models, [4, 2, 1.5, 1])
        tokens = max(1, round(rng.lognormvariate(0, 0.6) * median_s / model.timing.token_s))
        arrivals.append(Arrival(at=at, deployment=model.deployment.name, prompt_tokens=50, output_tokens=tokens))
    return cluster, arrivals


def _known(nodes: tuple[NodeSpec, ...], models: list[ModelSpec]) -> Learnt:
    def level(value: float) -> Level:
        return Level(value=value, observations=5)

    (size_bytes,) = {model.checkpoint.size_bytes for model in models}
    times = StartTimes(
        grant=level(0.0), fork=level(0.0), whole=level(size_bytes / LINK_BPS + BUILD_S), rest=level(BUILD_S)
    )
    return Learnt(
        reading={(node.name, Tier.SSD): level(1 / SSD_BPS) for node in nodes},
        starts={(model.checkpoint.digest, DeviceKind.CUDA): times for model in models},
    )
