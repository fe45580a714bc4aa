"""Migration: one running request on its way from one replica to another of the same deployment (paper §5).

Tokens move, never KV cache: the destination recomputes it from prompt and output, in rounds, while the source decodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sllm.core.ids import MigrationId, NodeName, ReplicaId, RequestId
from sllm.core.route import RouteTarget


class MigrationState(StrEnum):
    QUEUED = "queued"  # others of its replica move first
    ROUNDS = "rounds"  # the destination recomputes, the source decodes
    MOVED = "moved"  # handed over: the gateway has been told where the request goes on
    FINISHED = "finished"  # the request ended at its source first
    CANCELLED = "cancelled"  # it stays where it is
    FAILED = "failed"  # so it does; `error` says why


OVER = (MigrationState.MOVED, MigrationState.FINISHED, MigrationState.CANCELLED, MigrationState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeCost:
    """What a replica takes to recompute `t` tokens: `per_token_s` * t + `fixed_s` (paper §5.2: a * (t_in + t_out) + b).

    `observations` 0: nothing is known yet, and both are guesses.
    """

    per_token_s: float = 0.0
    fixed_s: float = 0.0
    observations: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationOrder:
    """What the source is told: move requests of `replica` to `target`, at most `concurrency` at once.

    No `requests`: all that run when it begins. What has not been handed over within `within_s` seconds stays.
    """

    id: MigrationId
    replica: ReplicaId
    generation: int
    target: RouteTarget
    requests: tuple[RequestId, ...] = ()
    concurrency: int = 4
    within_s: float = 60.0
    cost: RecomputeCost = field(default_factory=RecomputeCost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round, as its destination measured it: `tokens` of which `cached_tokens` needed no work took `seconds`."""

    tokens: int
    cached_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """How far the migration of one request has come; told at each change. The last one has a state of `OVER`.

    `output_tokens` is where the request stood: at the handover once it is MOVED. `last_round` is set when one has just
    ended. `predicted_pause_s` is what the client was expected to wait when the handover was decided.
    """

    migration: MigrationId
    request: RequestId
    state: MigrationState
    rounds: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    sent_bytes: int = 0
    last_round: Round | None = None
    predicted_pause_s: float | None = None
    error: str = ""
    error_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is expected of a request that runs: the pause that its client would see if it moved, how long its migration
    would take as a whole, and how long it runs on if it stays (None: not known). `moves`: how often it went on on
    another replica already."""

    pause_s: float = 0.0
    move_s: float = 0.0
    left_s: float | None = None
    moves: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMove:
    """What would become of one request: `move` is False if it is expected to finish sooner where it is.

    `pause_s` is the pause that its client would see, `left_s` how long it is expected to run on; `why` is for people.
    """

    request: RequestId
    source: ReplicaId
    source_node: NodeName
    target: ReplicaId | None
    target_node: NodeName | None
    move: bool
    pause_s: float
    left_s: float | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPlan:
    """What a migration or a drain would do; `starts` are nodes on which a replica would be started for it."""

    moves: tuple[PlannedMove, ...] = ()
    starts: tuple[NodeName, ...] = ()
    why: str = ""
