"""Request: one inference, as gateways report it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sllm.core.ids import DeploymentName, NodeName, ReplicaId, RequestId


class RequestState(StrEnum):
    HELD = "held"  # no replica has room: it waits at the controller
    RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """A row of `sllm requests`; the choices of n > 1 are one row. `node` is filled in by the controller.

    `max_tokens` bounds its output, all choices together; `interval_s` is the time between two tokens of one choice.
    Both are 0 while they are not known. `moves` counts how often it went on on another replica, `choices` those
    that are not over.
    """

    id: RequestId
    deployment: DeploymentName
    state: RequestState
    replica: ReplicaId | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    started_at: float = 0.0
    node: NodeName | None = None
    max_tokens: int = 0
    interval_s: float = 0.0
    moves: int = 0
    choices: int = 1
