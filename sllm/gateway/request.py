"""What this process holds of each request under way: an OpenRequest, and its token sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sllm.core.ids import DeploymentName, ReplicaId, RequestId
from sllm.core.pace import Pace
from sllm.core.request import RequestRow, RequestState
from sllm.core.route import RouteTarget
from sllm.core.tokens import Finish, FinishReason, TokenOutput
from sllm.errors import SllmError
from sllm.gateway.journal import Journal
from sllm.gateway.recovery import Troubles

if TYPE_CHECKING:
    from sllm.gateway.connection import Connection

Batch = list[tuple[str, TokenOutput]]

_FAILED = Finish(reason=FinishReason.ERROR)


class Sink(Protocol):
    """Where a sequence's output goes: its front end, which is woken once per batch."""

    def put(self, batch: Batch, timestamp: float) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One choice for one prompt, as the engine sees it. `key` is how its front end names it.

    `connection` is set while an engine works on it.
    """

    key: str
    request: OpenRequest
    sink: Sink
    journal: Journal
    sampling_params: bytes
    cache_salt: str = ""
    arrival_time: float = 0.0
    reasoning_ended: bool | None = None
    max_tokens: int = 0
    connection: Connection | None = None
    stream_id: int = 0
    pace: Pace = field(default_factory=Pace)

    def put_failure(self) -> None:
        """Tell the front end that the sequence failed; why is in its request."""
        output = TokenOutput(stream_id=self.stream_id, position=len(self.journal.tokens), token_ids=[], finish=_FAILED)
        self.sink.put([(self.key, output)], 0.0)


def _accepts_all(revision: int) -> bool:
    return True


def _tell_nobody() -> None:
    pass


@dataclass(slots=True, kw_only=True, eq=False)
class OpenRequest:
    """One request of a client, from its arrival until its answer is over.

    `sequences` are those not yet finished (n choices are n sequences of one request, on one replica).
    `failure` is what ended it; `restart` says that it must be tokenised anew, by the front end of `revision`, which is
    only done before its first token. `deadline` is on the event loop's clock and holds while it waits for a replica.
    `interrupted` is called when its tokens stop coming for a while. `moves` counts how often it went on on another
    replica than `ran_on`; `troubles` are why, and `avoid` where not to go again.
    """

    id: RequestId
    deployment: DeploymentName
    streaming: bool
    started_at: float
    deadline: float
    accepts: Callable[[int], bool] = _accepts_all
    sequences: dict[str, Sequence] = field(default_factory=dict)
    target: RouteTarget | None = None
    asking: asyncio.Task[None] | None = None
    phase: str = "waiting"
    progress: float | None = None
    failure: SllmError | None = None
    restart: bool = False
    revision: int | None = None
    restarts: int = 0
    closed: bool = False
    interrupted: Callable[[], None] = _tell_nobody
    moves: int = 0
    ran_on: ReplicaId | None = None
    troubles: Troubles = field(default_factory=Troubles)
    avoid: set[ReplicaId] = field(default_factory=set)
    prompts: list[list[int]] = field(default_factory=list)
    finished_tokens: int = 0
    max_tokens: int = 0

    @property
    def output_tokens(self) -> int:
        return self.finished_tokens + sum(len(s.journal.tokens) for s in self.sequences.values())

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def is_over(self) -> bool:
        """True if nothing more may be done for it."""
        return self.closed or self.failure is not None or self.restart

    def add(self, sequence: Sequence) -> None:
        self.sequences[sequence.key] = sequence
        self.max_tokens += sequence.max_tokens
        if not any(prompt is sequence.journal.prompt for prompt in self.prompts):
            self.prompts.append(sequence.journal.prompt)

    def remove(self, sequence: Sequence) -> None:
        if self.sequences.pop(sequence.key, None) is not None:
            self.finished_tokens += len(sequence.journal.tokens)

    def reopen(self) -> None:
        """Begin anew, after `restart`."""
        self.restart = False
        self.prompts.clear()
        self.max_tokens = 0

    def place(self, target: RouteTarget) -> None:
        """It runs at `target` from now on."""
        self.target = target
        self.phase, self.progress = "running", None
        self.moves += self.ran_on not in (None, target.replica)
        self.ran_on = target.replica

    def row(self) -> RequestRow:
        """Return what is reported of it."""
        return RequestRow(
            id=self.id,
            deployment=self.deployment,
            state=RequestState.HELD if self.target is None else RequestState.RUNNING,
            replica=None if self.target is None else self.target.replica,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            started_at=self.started_at,
            max_tokens=self.max_tokens,
            interval_s=max((s.pace.interval_s or 0.0 for s in self.sequences.values()), default=0.0),
            moves=self.moves,
            choices=max(1, len(self.sequences)),
        )


# Set around each call of a front end; what the front end asks of its engine is thereby known to be for this request.
current_request: ContextVar[OpenRequest] = ContextVar("current_request")
