"""One request at the source of its migration: rounds, then the handover, or it stays (paper §5). Pure.

    WAITING --Begin--> ROUND --RoundEnded--> ROUND ... --RoundEnded--> LEAVING --Advanced--> OVER (handed over)
                       FILLING --Advanced--> ROUND

FILLING waits until a block is full, for the last round; LEAVING for the next token, so that the handover comes just
behind one. From every state it may end without having moved: the request ends first, the destination fails, it is
called off, its time is over. Nothing has to be undone then but a round under way: the request was decoding here all the
time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from sllm.core.migration import MigrationState, RecomputeCost, Round
from sllm.errors import SllmError
from sllm.migration import estimate
from sllm.migration.policy import Next, Progress, Road, fill_s, following, full, pause_s

PATIENCE = 2.0  # tokens that are waited for may take so many times as long as they should


class Phase(StrEnum):
    WAITING = "waiting"  # others of its replica move first
    ROUND = "round"  # the destination recomputes what it was sent
    FILLING = "filling"  # the last round is sent when a block is full
    LEAVING = "leaving"  # with the next token it goes
    OVER = "over"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """`covered_tokens` have been recomputed at the destination; `asked_tokens` are being so. `outcome` once OVER.

    FILLING and LEAVING last until the request has `awaited_tokens`.
    """

    road: Road
    deadline: float
    phase: Phase = Phase.WAITING
    rounds: int = 0
    asked_tokens: int = 0
    covered_tokens: int = 0
    awaited_tokens: int = 0
    outcome: MigrationState | None = None


# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Its turn has come."""

    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnded:
    """The destination has computed what it was asked to. `round_trip_s`: what the call took beyond its work."""

    round: Round
    progress: Progress
    round_trip_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFailed:
    """The destination refused, is not there, or died."""

    error: SllmError


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    """Its gateway has been sent more of it."""

    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """Tokens have been waited for as long as `Watch` said."""

    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnded:
    """It finished here, its client left, or its engine failed: there is nothing to move any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalledOff:
    """Whoever ordered the migration does not want it any more, or this replica stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeOver:
    """The deadline has come."""


Event = Begin | RoundEnded | RoundFailed | Advanced | Waited | RequestEnded | CalledOff | TimeOver


# --- effects --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """Send the destination all tokens so far (`tokens` of them), and bring its answer back as an event."""

    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRecompute:
    """End the call to the destination that is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Bring `Advanced` after each of its steps, and `Waited` at `until`."""

    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """Now, in one piece: stop here, tell the gateway where it goes on."""

    predicted_pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Tell how far it has come. `last_round` when one has just ended."""

    state: MigrationState
    last_round: Round | None = None
    error: SllmError | None = None


Effect = Recompute | StopRecompute | Watch | HandOver | Report
Step = tuple[Source, tuple[Effect, ...]]


# --- transitions ----------------------------------------------------------------------------


def begin(source: Source, event: Begin, now: float) -> Step:
    """Send the first round, or none where it would not pay."""
    return _go_on(source, event.progress, now)


def round_ended(source: Source, event: RoundEnded, now: float) -> Step:
    """Measure, and decide again: another round for what was generated meanwhile, or the handover (paper §5.2)."""
    measured = event.round.tokens - event.round.cached_tokens
    cost = estimate.updated(source.road.cost, measured, event.round.seconds)
    road = replace(source.road, cost=cost, round_trip_s=event.round_trip_s)
    source = replace(source, road=road, rounds=source.rounds + 1, covered_tokens=source.asked_tokens)
    source, effects = _go_on(source, event.progress, now)
    return source, (Report(state=MigrationState.ROUNDS, last_round=event.round), *effects)


def filled(source: Source, event: Advanced, now: float) -> Step:
    """Send the last round as soon as the block is full."""
    enough = event.progress.tokens >= source.awaited_tokens
    return _round(source, event.progress) if enough else (source, ())


def left(source: Source, event: Advanced, now: float) -> Step:
    """Hand over behind the token that has just been sent: the next one is what the client waits for."""
    enough = event.progress.tokens >= source.awaited_tokens
    return _hand_over(source, event.progress) if enough else (source, ())


def waited(source: Source, event: Waited, now: float) -> Step:
    """A source that has become slow is not waited for."""
    return _hand_over(source, event.progress)


def round_failed(source: Source, event: RoundFailed, now: float) -> Step:
    """The destination is lost: the source goes on as if nothing had happened (paper §5.3)."""
    return _over(source, MigrationState.FAILED, event.error)


def request_ended(source: Source, event: RequestEnded, now: float) -> Step:
    """The inference finished first: it was answered as usual, the destination is told to stop (paper §5.3)."""
    return _over(source, MigrationState.FINISHED)


def called_off(source: Source, event: CalledOff, now: float) -> Step:
    return _over(source, MigrationState.CANCELLED)


def time_over(source: Source, event: TimeOver, now: float) -> Step:
    """Stay: handing over late, with a gap that rounds did not close, would be a pause that nobody agreed to."""
    return _over(source, MigrationState.CANCELLED)


TRANSITIONS: dict[tuple[Phase, type[Any]], Callable[[Source, Any, float], Step]] = {
    (Phase.WAITING, Begin): begin,
    (Phase.WAITING, RequestEnded): request_ended,
    (Phase.WAITING, CalledOff): called_off,
    (Phase.WAITING, TimeOver): time_over,
    (Phase.ROUND, RoundEnded): round_ended,
    (Phase.ROUND, RoundFailed): round_failed,
    (Phase.ROUND, RequestEnded): request_ended,
    (Phase.ROUND, CalledOff): called_off,
    (Phase.ROUND, TimeOver): time_over,
    (Phase.FILLING, Advanced): filled,
    (Phase.FILLING, Waited): waited,
    (Phase.FILLING, RequestEnded): request_ended,
    (Phase.FILLING, CalledOff): called_off,
    (Phase.FILLING, TimeOver): time_over,
    (Phase.LEAVING, Advanced): left,
    (Phase.LEAVING, Waited): waited,
    (Phase.LEAVING, RequestEnded): request_ended,
    (Phase.LEAVING, CalledOff): called_off,
    (Phase.LEAVING, TimeOver): time_over,
}


def step(source: Source, event: Event, now: float) -> Step:
    """Return the next state and what is to be done. An event without a row comes too late, and changes nothing."""
    transition = TRANSITIONS.get((source.phase, type(event)))
    return (source, ()) if transition is None else transition(source, event, now)


def _go_on(source: Source, progress: Progress, now: float) -> Step:
    left_s = source.deadline - now
    match following(progress, source.covered_tokens, source.rounds, source.road, left_s=left_s):
        case Next.ROUND:
            return _round(source, progress)
        case Next.FILL:
            return _fill(source, progress, now)
        case Next.HAND_OVER:
            return _leave(source, progress, now)


def _round(source: Source, progress: Progress) -> Step:
    asked = replace(source, phase=Phase.ROUND, asked_tokens=progress.tokens)
    return asked, (*_first_report(source), Recompute(tokens=progress.tokens))


def _fill(source: Source, progress: Progress, now: float) -> Step:
    awaited = full(progress, source.road.block_size)
    if awaited == progress.tokens:
        return _round(source, progress)
    until = now + PATIENCE * fill_s(progress, source.road.block_size)
    waiting = replace(source, phase=Phase.FILLING, awaited_tokens=awaited)
    return waiting, (*_first_report(source), Watch(until=until))


def _leave(source: Source, progress: Progress, now: float) -> Step:
    if progress.interval_s <= 0:  # it has no rhythm yet: nobody knows when its next token comes
        return _hand_over(source, progress)
    until = now + PATIENCE * progress.interval_s
    waiting = replace(source, phase=Phase.LEAVING, awaited_tokens=progress.tokens + 1)
    return waiting, (*_first_report(source), Watch(until=until))


def _hand_over(source: Source, progress: Progress) -> Step:
    predicted = pause_s(progress, source.covered_tokens, source.road)
    over = replace(source, phase=Phase.OVER, outcome=MigrationState.MOVED)
    return over, (HandOver(predicted_pause_s=predicted), Report(state=MigrationState.MOVED))


def _first_report(source: Source) -> tuple[Report, ...]:
    return (Report(state=MigrationState.ROUNDS),) if source.phase is Phase.WAITING else ()


def _over(source: Source, outcome: MigrationState, error: SllmError | None = None) -> Step:
    under_way = source.phase is Phase.ROUND and error is None
    stop: tuple[Effect, ...] = (StopRecompute(),) if under_way else ()
    return replace(source, phase=Phase.OVER, outcome=outcome), (*stop, Report(state=outcome, error=error))


def new(*, cost: RecomputeCost, block_size: int, deadline: float) -> Source:
    return Source(road=Road(cost=cost, block_size=block_size), deadline=deadline)
