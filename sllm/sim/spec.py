"""What is simulated: nodes, models, requests and failures, as values. Bytes, seconds, bytes per second."""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.device import DeviceKind
from sllm.core.ids import DeploymentName, DeviceId, NodeName, ReplicaId
from sllm.core.migration import RecomputeCost
from sllm.core.replica import ReplicaSpec
from sllm.core.snapshot import DeploymentView, Policy, Revision
from sllm.core.startup import NOTHING_LEARNT, Learnt


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A GPU server. `dram_bytes` is its pool, `ssd_bytes` the size of its disk; `ssd_bandwidth_bps` is of the node (one
    checkpoint is read at a time), `dram_bandwidth_bps` of each device's link; a stopped replica's devices are free
    after `release_s`. The digests `in_memory` are in the pool when the simulation begins."""

    name: NodeName
    devices: int
    device_memory_bytes: int
    dram_bytes: int
    ssd_bandwidth_bps: float
    dram_bandwidth_bps: float
    device_kind: DeviceKind = DeviceKind.CUDA
    release_s: float = 0.0
    in_memory: tuple[str, ...] = ()
    ssd_bytes: int = 10**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What work takes at the engine. A start takes `fork_s`, in which its bytes come already, and `build_s` when all of
    them are there. With a `rest_s`, the engine is built while they come: what is left when the last one has come is
    `build_s` less the time since the fork, and at least `rest_s`. A request takes `prefill_token_s` for each token of
    its prompt and `token_s` for each of its output, however many run beside it; one that has lost its replica
    `recompute_token_s` for each token that it had and `recompute_s` before it goes on (paper §5.2)."""

    fork_s: float = 0.0
    build_s: float = 0.0
    rest_s: float | None = None
    prefill_token_s: float = 0.0
    token_s: float = 0.0
    recompute_token_s: float = 0.0
    recompute_s: float = 0.0

    @property
    def recompute_cost(self) -> RecomputeCost:
        """As if it had been measured often."""
        return RecomputeCost(per_token_s=self.recompute_token_s, fixed_s=self.recompute_s, observations=1)

    def left_s(self, loaded_s: float) -> float:
        """What of the construction is left when the last byte comes, so long after the fork; 0: no later than that."""
        return self.build_s if self.rest_s is None else max(self.rest_s, self.build_s - loaded_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A deployment with its checkpoint. `nodes` have a copy on SSD, and keep it.

    `needed` replicas are needed when the simulation begins; no more than k have been for `unneeded_s[k]` seconds.
    """

    deployment: DeploymentSpec
    checkpoint: Checkpoint
    nodes: tuple[NodeName, ...]
    timing: Timing = Timing()
    needed: int = 0
    unneeded_s: tuple[float, ...] = ()

    def view(self) -> DeploymentView:
        """The deployment as the controller knows it before the first request."""
        made = Deployment(
            spec=self.deployment, revision=1, digest=self.checkpoint.digest, created_at=0.0, updated_at=0.0
        )
        return DeploymentView(
            current=Revision(
                deployment=made,
                max_model_len=self.checkpoint.max_model_len,
                size_bytes=self.checkpoint.size_bytes,
            ),
            needed=self.needed,
            needed_at=tuple(-seconds for seconds in self.unneeded_s),
        )

    def replica(self, number: int, devices: tuple[DeviceId, ...]) -> ReplicaSpec:
        """Its replica on some devices, the `number`-th of all replicas."""
        return ReplicaSpec(
            id=ReplicaId(f"rep-{number:012d}"),
            deployment=self.deployment.name,
            revision=1,
            generation=number,
            checkpoint=self.checkpoint.name,
            digest=self.checkpoint.digest,
            devices=devices,
            capacity=self.deployment.capacity,
            max_model_len=self.checkpoint.max_model_len,
            engine_args=self.deployment.engine_args,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request that comes at `at`. `pace` is the noise of its service: it takes so many times what `Timing` says.
    Not `counted`: it was open before the simulation began, and is in none of its results."""

    at: float
    deployment: DeploymentName
    prompt_tokens: int
    output_tokens: int
    pace: float = 1.0
    counted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """A replica that is there when the simulation begins, on devices that no other has: `ready`, or just told to
    start."""

    deployment: DeploymentName
    node: NodeName
    devices: tuple[DeviceId, ...]
    ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A node is gone from `at` on, with all that runs on it; after `for_s` it is back, and holds nothing but its SSD.
    None: it stays away."""

    node: NodeName
    at: float
    for_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """All of a world but its requests. A held request is given up after `timeout_s`, one that finds `queue_length`
    requests of its deployment held is refused at once; a request notices after `silence_s` that its node is gone. What
    a load takes is multiplied by noise of mean 1 and coefficient of variation `load_cv`. `present` are the replicas,
    `known` what the controller has learnt, when it begins."""

    nodes: tuple[NodeSpec, ...]
    models: tuple[ModelSpec, ...]
    failures: tuple[Failure, ...] = ()
    policy: Policy = field(default_factory=Policy)
    timeout_s: float = 300.0
    queue_length: int = 256
    silence_s: float = 8.0
    load_cv: float = 0.0
    present: tuple[Present, ...] = ()
    known: Learnt = NOTHING_LEARNT
