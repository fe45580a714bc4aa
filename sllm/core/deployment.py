"""Deployment: what the user wants served under one OpenAI model id."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sllm.core.engine_args import check_engine_args
from sllm.core.ids import CheckpointName, DeploymentName, checkpoint_name, deployment_name
from sllm.errors import InvalidArgument

# A replica takes this many times its target concurrency before requests are queued: the target says when to add a
# replica, the capacity says when to stop sending to one.
CAPACITY_PER_TARGET = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSpec:
    """The user's wish. Two specs that differ only in scaling fields share a revision; any other change makes a new one.

    `devices` is the number of devices of one replica; `max_model_len` None means the checkpoint's own;
    `engine_args` go to the engine and to the front end alike, each takes what it knows.
    """

    name: DeploymentName
    checkpoint: CheckpointName
    min_replicas: int = 0
    max_replicas: int = 1
    devices: int = 1
    keep_alive_s: float = 60.0
    target_concurrency: int = 8
    max_model_len: int | None = None
    engine_args: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        deployment_name(self.name)
        checkpoint_name(self.checkpoint)
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise InvalidArgument(
                f"deployment {self.name!r}: min is {self.min_replicas} and max is {self.max_replicas}",
                hint="0 <= min <= max is needed",
            )
        if self.max_replicas < 1:
            raise InvalidArgument(
                f"deployment {self.name!r}: max is 0, so it could never answer",
                hint="use `sllm delete` to stop it for good, `sllm scale NAME --replicas 0` to stop it until asked",
            )
        if self.devices < 1 or self.target_concurrency < 1:
            raise InvalidArgument(f"deployment {self.name!r}: devices and target concurrency must be at least 1")
        if self.keep_alive_s < 0:
            raise InvalidArgument(f"deployment {self.name!r}: keep-alive must not be negative")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise InvalidArgument(f"deployment {self.name!r}: max model length must be at least 1")
        check_engine_args(self.engine_args)

    @property
    def capacity(self) -> int:
        """Requests that one replica takes at a time before more are queued."""
        return self.target_concurrency * CAPACITY_PER_TARGET

    def serves_like(self, other: DeploymentSpec) -> bool:
        """True if a replica made for `other` can go on serving this spec (only scaling fields differ)."""
        return (
            self.checkpoint == other.checkpoint
            and self.devices == other.devices
            and self.capacity == other.capacity
            and self.max_model_len == other.max_model_len
            and self.engine_args == other.engine_args
        )


class DeploymentState(StrEnum):
    """Derived from its replicas; never stored."""

    READY = "ready"  # at least one replica is ready
    STARTING = "starting"  # none is ready, one is on its way
    SLEEPING = "sleeping"  # at zero, a request wakes it
    WAITING = "waiting"  # wanted, but nothing can hold it now
    FAILED = "failed"  # replicas failed too often in a row
    DELETING = "deleting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A stored deployment. `digest` pins the checkpoint's content at the time of deploying."""

    spec: DeploymentSpec
    revision: int
    digest: str
    created_at: float
    updated_at: float
    deleting: bool = False
