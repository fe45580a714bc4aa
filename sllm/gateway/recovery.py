"""Decides (pure) what a failure means for a request: it goes on elsewhere, or its client is told.

A request may be what its engine died of. So what counts is replicas in a row that gave it not one token: a request that
gets on is not to blame, one that gets nowhere must not take down one replica after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from sllm.errors import EngineFailed, SllmError, StaleGeneration, Unavailable

# So many replicas in a row may die with a request without having got it on.
_MAX_DEATHS = 2
# So often it is sent on when it was turned away.
_MAX_REFUSALS = 3


class Trouble(Enum):
    """What a failure says of the replica and of the request."""

    REQUEST = auto()  # the request is wrong: no replica will take it
    REFUSED = auto()  # this replica takes no requests, or not any more: it is stopping, or another by now
    UNREACHED = auto()  # it was gone before the request came there
    DIED = auto()  # it had the request when it, or its engine, broke


class Verdict(Enum):
    FAIL = auto()
    GO_ON = auto()
    GO_ON_AFRESH = auto()  # with all the time for it: it had got on, or a replica died with it for the first time


def trouble_of(error: SllmError, *, broken: bool, reached: bool) -> Trouble:
    """Judge an error: of a stream that is `broken`, whose host was `reached` or not, or else of the request alone."""
    if isinstance(error, StaleGeneration):
        return Trouble.REFUSED
    if broken:
        return Trouble.DIED if reached else Trouble.UNREACHED
    if isinstance(error, Unavailable):
        return Trouble.REFUSED
    return Trouble.DIED if isinstance(error, EngineFailed) else Trouble.REQUEST


@dataclass(slots=True)
class Troubles:
    """What a request has gone through since its last new token. `tokens` is how many it had then, all choices together.

    A replica that could not be reached is not counted: the deadline alone ends the search for one that can.
    """

    tokens: int = 0
    deaths: int = 0
    refusals: int = 0

    def add(self, trouble: Trouble, tokens: int) -> Verdict:
        """Take in a failure of a request that has `tokens` by now."""
        if trouble is Trouble.REQUEST:
            return Verdict.FAIL
        if tokens > self.tokens:
            self.tokens, self.deaths, self.refusals = tokens, 0, 0
            return Verdict.GO_ON_AFRESH
        self.deaths += trouble is Trouble.DIED
        self.refusals += trouble is Trouble.REFUSED
        if self.deaths >= _MAX_DEATHS or self.refusals > _MAX_REFUSALS:
            return Verdict.FAIL
        first_death = trouble is Trouble.DIED and self.deaths == 1
        return Verdict.GO_ON_AFRESH if first_death else Verdict.GO_ON
