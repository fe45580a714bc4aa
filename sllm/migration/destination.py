"""The destination of migrations: what it takes in of rounds (paper §5). Pure.

A round is cache, not a request: it ends with its caller, with a newer one of the same request, or with the request's
own arrival; and nothing of it need be given back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sllm.core.ids import RequestId

MAX_AT_ONCE = 16  # each takes a place in the engine's batch; a source bounds its own, this bounds many sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """The rounds under way: the engine's key of each, by request."""

    rounds: tuple[tuple[RequestId, int], ...] = ()

    def key_of(self, request: RequestId) -> int | None:
        return dict(self.rounds).get(request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A source sends a round; `key` is what the engine is to know it by."""

    request: RequestId
    key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """The request itself goes on here now, or its source or its gateway is gone."""

    request: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """The engine has done a round, or failed at it."""

    key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """The engine failed, or the replica stops."""


Event = Asked | Arrived | Computed | Closing


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Free the engine of it, and answer its caller with an error."""

    key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """There are too many already."""

    key: int


Effect = Compute | Drop | Answer | Refuse
Step = tuple[Destination, tuple[Effect, ...]]


def asked(state: Destination, event: Asked) -> Step:
    older = state.key_of(event.request)
    rest = tuple(row for row in state.rounds if row[0] != event.request)
    if len(rest) >= MAX_AT_ONCE:
        return state, (Refuse(key=event.key),)
    drop: tuple[Effect, ...] = () if older is None else (Drop(key=older),)
    return replace(state, rounds=(*rest, (event.request, event.key))), (*drop, Compute(key=event.key))


def arrived(state: Destination, event: Arrived) -> Step:
    key = state.key_of(event.request)
    rest = tuple(row for row in state.rounds if row[0] != event.request)
    return replace(state, rounds=rest), () if key is None else (Drop(key=key),)


def computed(state: Destination, event: Computed) -> Step:
    known = any(key == event.key for _, key in state.rounds)
    rest = tuple(row for row in state.rounds if row[1] != event.key)
    return replace(state, rounds=rest), (Answer(key=event.key),) if known else ()


def closing(state: Destination, event: Closing) -> Step:
    return Destination(), tuple(Drop(key=key) for _, key in state.rounds)


TRANSITIONS: dict[type[Any], Callable[[Destination, Any], Step]] = {
    Asked: asked,
    Arrived: arrived,
    Computed: computed,
    Closing: closing,
}


def step(state: Destination, event: Event) -> Step:
    """Return the next state and what is to be done."""
    return TRANSITIONS[type(event)](state, event)
