"""What is simulated: nodes, models, requests and failures, as values. Bytes, seconds, bytes per second."""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm.core.checkpoint import Checkpoint
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.device import DeviceKind
from sllm.core.ids import DeploymentName, NodeName
from sllm.core.migration import RecomputeCost
from sllm.core.snapshot import DeploymentView, Policy, Revision


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A GPU server. `dram_bytes` is its pool; `ssd_bandwidth_bps` is of the node (one checkpoint is read at a time),
    `dram_bandwidth_bps` of each device's link; a stopped replica's devices are free after `release_s`."""

    name: NodeName
    devices: int
    device_memory_bytes: int
    dram_bytes: int
    ssd_bandwidth_bps: float
    dram_bandwidth_bps: float
    device_kind: DeviceKind = DeviceKind.CUDA
    release_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What work takes at the engine. A start takes `fork_s`, in which its bytes come already, and `build_s` when all of
    them are there; a request `prefill_token_s` for each token of its prompt and `token_s` for each of its output,
    however many run beside it; one that has lost its replica `recompute_token_s` for each token that it had and
    `recompute_s` before it goes on (paper §5.2)."""

    fork_s: float = 0.0
    build_s: float = 0.0
    prefill_token_s: float = 0.0
    token_s: float = 0.0
    recompute_token_s: float = 0.0
    recompute_s: float = 0.0

    @property
    def recompute_cost(self) -> RecomputeCost:
        """As if it had been measured often."""
        return RecomputeCost(per_token_s=self.recompute_token_s, fixed_s=self.recompute_s, observations=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A deployment with its checkpoint. `nodes` have a copy on SSD, and keep it."""

    deployment: DeploymentSpec
    checkpoint: Checkpoint
    nodes: tuple[NodeName, ...]
    timing: Timing = Timing()

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
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request that comes at `at`. `pace` is the noise of its service: it takes so many times what `Timing` says."""

    at: float
    deployment: DeploymentName
    prompt_tokens: int
    output_tokens: int
    pace: float = 1.0


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
    a load takes is multiplied by noise of mean 1 and coefficient of variation `load_cv`."""

    nodes: tuple[NodeSpec, ...]
    models: tuple[ModelSpec, ...]
    failures: tuple[Failure, ...] = ()
    policy: Policy = field(default_factory=Policy)
    timeout_s: float = 300.0
    queue_length: int = 256
    silence_s: float = 8.0
    load_cv: float = 0.0
