"""Tokens on their way: what goes into an engine for one request, and what one engine step gives back.

These are the values of the token protocol (proto/sllm/rpc/engine.proto). They carry tokens and numbers, never text,
and nothing of vLLM's own classes, so that gateway and engine host may run different versions of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from sllm.core.ids import RequestId
from sllm.core.route import RouteTarget
from sllm.errors import SllmError

PROTOCOL_VERSION = 1
# An engine's first step may compile and allocate: so many times as long as for any other is waited for it.
FIRST_STEP_PATIENCE = 5


class FinishReason(Enum):
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4
    REPETITION = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """One inference. `stream_id` names it on its connection, `request_id` everywhere else.

    The last `num_output_tokens` of `token_ids` are output it has already had (it is being resumed).
    `sampling_params` is JSON with vLLM's field names.
    """

    stream_id: int
    request_id: RequestId
    token_ids: list[int]
    sampling_params: bytes
    num_output_tokens: int = 0
    cache_salt: str = ""
    priority: int = 0
    arrival_time: float = 0.0
    reasoning_ended: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """`error` says why when the reason is ERROR. At most one of the stop fields is set."""

    reason: FinishReason
    stop_token_id: int | None = None
    stop_string: str | None = None
    error: SllmError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """`num_rows` rows of `width` candidates, flattened; the first column is the sampled (or prompt) token."""

    num_rows: int
    width: int
    token_ids: list[int]
    values: list[float]
    ranks: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """What one step made for one request. `position` counts output tokens before these; a reader checks it for gaps."""

    stream_id: int
    position: int
    token_ids: list[int]
    finish: Finish | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    prefill: Prefill | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A request goes on at `target`, from output position `position` on; nothing more comes of it here.

    Whoever reads has got all tokens before that position, and asks for the rest there: under a new stream id, so that
    nothing of the old one can be taken for it.
    """

    stream_id: int
    position: int
    target: RouteTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutputs:
    """What one engine step made for all requests of one connection, then what of them has moved.

    `steps` counts the engine's steps. One that has neither is a sign of life.
    """

    outputs: list[TokenOutput] = field(default_factory=list)
    timestamp: float = 0.0
    moves: list[Moved] = field(default_factory=list)
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStream:
    protocol_version: int
    gateway: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequests:
    stream_ids: list[int]


ClientFrame = OpenStream | TokenRequest | AbortRequests
