"""How a replica's status changes. Pure: (status, event, now, wall) -> status. An event that a state does not know
changes nothing, so that a late word from a host cannot undo a stop."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sllm.core.replica import ReplicaState, ReplicaStatus, StartPhase
from sllm.errors import SllmError
from sllm.rpc.engine import HostStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBegan:
    phase: StartPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFound:
    """The engine host listens at `address`."""

    address: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReported:
    status: HostStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    drain_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    error: SllmError


Event = PhaseBegan | HostFound | HostReported | StopAsked | Failed

ACCEPTED: dict[ReplicaState, tuple[type[Event], ...]] = {
    ReplicaState.STARTING: (PhaseBegan, HostFound, HostReported, StopAsked, Failed),
    ReplicaState.READY: (HostReported, StopAsked, Failed),
    ReplicaState.DRAINING: (HostReported, StopAsked),
    ReplicaState.STOPPING: (HostReported,),
    ReplicaState.FAILED: (StopAsked,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """A status, and when its phase began on a clock that only goes forward."""

    status: ReplicaStatus
    phase_since: float


def step(tracked: Tracked, event: Event, now: float, *, wall: float) -> Tracked:
    """Return what `tracked` becomes by the event. Durations are told by `now`, dates by `wall`."""
    if not isinstance(event, ACCEPTED[tracked.status.state]):
        return tracked
    match event:
        case PhaseBegan(phase=phase):
            return _entered(tracked, phase, now)
        case HostReported(status=host):
            return _reported(tracked, host, now, wall)
        case _:
            return replace(tracked, status=_changed(tracked.status, event))


def _changed(status: ReplicaStatus, event: Event) -> ReplicaStatus:
    match event:
        case HostFound(address=address, pid=pid):
            return replace(status, address=address, pid=pid)
        case StopAsked(drain_s=drain_s):
            return replace(status, state=_stopping(status.state, drain_s))
        case Failed(error=error):
            return _failed(status, error.message, error.reason)
        case _:
            return status


def _stopping(state: ReplicaState, drain_s: float) -> ReplicaState:
    """Only what has served can have requests to finish."""
    served = state in (ReplicaState.READY, ReplicaState.DRAINING)
    return ReplicaState.DRAINING if served and drain_s > 0 else ReplicaState.STOPPING


def _entered(tracked: Tracked, phase: StartPhase, now: float) -> Tracked:
    status = tracked.status
    if phase is status.phase:
        return tracked
    # A start that began again has been in a phase before.
    seconds = status.phases_s.get(status.phase.value, 0.0) + now - tracked.phase_since
    phases_s = {**status.phases_s, status.phase.value: seconds}
    return Tracked(status=replace(status, phase=phase, progress=0.0, phases_s=phases_s), phase_since=now)


def _reported(tracked: Tracked, host: HostStatus, now: float, wall: float) -> Tracked:
    status = replace(tracked.status, running=host.running, waiting=host.waiting, memory_bytes=host.memory_bytes)
    tracked = replace(tracked, status=status)
    if status.state is ReplicaState.STARTING:
        return _starting(tracked, host, now, wall)
    if status.state is ReplicaState.READY:
        return replace(tracked, status=_serving(status, host))
    return tracked  # it is on its way out; who asked for that knows more than the host


def _starting(tracked: Tracked, host: HostStatus, now: float, wall: float) -> Tracked:
    if host.state is ReplicaState.FAILED:
        return replace(tracked, status=_failed(tracked.status, host.error, host.error_reason))
    tracked = _entered(tracked, host.phase, now)
    status = replace(tracked.status, progress=host.progress, phases_s={**tracked.status.phases_s, **host.phases_s})
    if host.state is ReplicaState.READY:
        status = replace(status, state=ReplicaState.READY, progress=1.0, ready_at=wall)
    return replace(tracked, status=status)


def _serving(status: ReplicaStatus, host: HostStatus) -> ReplicaStatus:
    if host.state is ReplicaState.FAILED:
        return _failed(status, host.error, host.error_reason)
    if host.state in (ReplicaState.DRAINING, ReplicaState.STOPPING):
        return replace(status, state=host.state)
    return status


def _failed(status: ReplicaStatus, error: str, reason: str) -> ReplicaStatus:
    return replace(status, state=ReplicaState.FAILED, error=error, error_reason=reason, running=0, waiting=0)
