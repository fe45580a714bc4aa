"""One order at its source: which requests wait, which move now, which are over. Pure.

At most `concurrency` move at once: each has a place in the destination's batch while it is recomputed there. Requests
that come after the order has begun are not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from sllm.core.ids import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinator:
    """`waiting` in the order in which they will begin."""

    concurrency: int
    waiting: tuple[RequestId, ...] = ()
    moving: frozenset[RequestId] = frozenset()
    is_called_off: bool = False

    @property
    def is_over(self) -> bool:
        return not self.waiting and not self.moving


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The order is to be carried out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """A request has moved, or stays."""

    request: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """No more: the order was called off, its time is over, or the replica stops."""


Event = Opened | Over | Stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    request: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOff:
    """Of one that moves: its own machine ends it. Of one that waits: it is over with that."""

    request: RequestId


Effect = Start | CallOff
Step = tuple[Coordinator, tuple[Effect, ...]]


def new(requests: Iterable[RequestId], *, concurrency: int) -> Coordinator:
    """Each request once, in the order given."""
    return Coordinator(concurrency=max(1, concurrency), waiting=tuple(dict.fromkeys(requests)))


def opened(state: Coordinator, event: Opened) -> Step:
    return _filled(state)


def over(state: Coordinator, event: Over) -> Step:
    rest = tuple(request for request in state.waiting if request != event.request)
    return _filled(replace(state, waiting=rest, moving=state.moving - {event.request}))


def stopped(state: Coordinator, event: Stopped) -> Step:
    every = (*sorted(state.moving), *state.waiting)
    return replace(state, waiting=(), is_called_off=True), tuple(CallOff(request=request) for request in every)


def _filled(state: Coordinator) -> Step:
    room = 0 if state.is_called_off else state.concurrency - len(state.moving)
    begun, rest = state.waiting[: max(0, room)], state.waiting[max(0, room) :]
    after = replace(state, waiting=rest, moving=state.moving | set(begun))
    return after, tuple(Start(request=request) for request in begun)


TRANSITIONS: dict[type[Any], Callable[[Coordinator, Any], Step]] = {
    Opened: opened,
    Over: over,
    Stopped: stopped,
}


def step(state: Coordinator, event: Event) -> Step:
    """Return the next state and what is to be done."""
    return TRANSITIONS[type(event)](state, event)
