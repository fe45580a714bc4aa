"""Request: one inference on its way through the simulated cluster."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from sllm.core.ids import RequestId
from sllm.core.residency import Tier
from sllm.migration.policy import Progress
from sllm.sim.spec import Arrival, Timing

if TYPE_CHECKING:
    from sllm.sim.replica import Replica


class Outcome(StrEnum):
    SERVED = "served"
    TIMED_OUT = "timed out"
    REFUSED = "refused"


class Served(StrEnum):
    """What a request's first token had to wait for."""

    WARM = "warm"  # nothing: a ready replica had room
    QUEUED = "queued"  # room at a replica that was there, or on its way, before it came
    DRAM = "dram"  # a start from memory
    SSD = "ssd"  # a start from SSD


@dataclass(slots=True, eq=False)
class Request:
    """`waited_s` is for how long nothing was computed for it that its client has yet to see: until its first replica,
    and after it lost one until what it had is computed again."""

    number: int
    arrival: Arrival
    held_at: float = 0.0
    replica: Replica | None = None
    granted_at: float = 0.0
    output_tokens: int = 0  # when it was last interrupted
    waited_s: float = 0.0
    served: Served | None = None
    losses: int = 0
    moves: int = 0
    first_at: float = 0.0  # when its next token is the first that is new at its replica
    attempt: int = 0  # tells a deadline or an end from one that was overtaken
    outcome: Outcome | None = None

    @property
    def id(self) -> RequestId:
        return RequestId(f"req-{self.number}")

    def begin(self, replica: Replica, timing: Timing, now: float) -> float:
        """Let it run on a replica from now on; return when it will end."""
        if self.served is None:
            self.served = self._kind(replica, now)
        self.waited_s += now - self.held_at + self._rework_s(timing)
        self.first_at = now + self._first_s(timing)
        return self._run(replica, timing, now)

    def move(self, replica: Replica, timing: Timing, now: float, pause_s: float) -> float:
        """Let it go on at another replica, after a pause that its client sees; return when it will end."""
        self.output_tokens = self.tokens_at(timing, now)
        self.first_at = max(self.first_at, now) + pause_s
        self.waited_s += pause_s
        self.moves += 1
        return self._run(replica, timing, now)

    def progress(self, timing: Timing, now: float) -> Progress:
        """How far it is, as its gateway reports it."""
        return Progress(
            prompt_tokens=self.arrival.prompt_tokens,
            output_tokens=self.tokens_at(timing, now),
            interval_s=self._token_s(timing),
        )

    def tokens_at(self, timing: Timing, now: float) -> int:
        """Its output by now, if it runs. The last token is never among them: it would have ended."""
        ran_s = now - self.first_at
        new = int(ran_s / self._token_s(timing)) if ran_s > 0 and self._token_s(timing) > 0 else 0
        return min(max(0, self.arrival.output_tokens - 1), self.output_tokens + new)

    def _run(self, replica: Replica, timing: Timing, now: float) -> float:
        self.replica, self.granted_at = replica, now
        self.attempt += 1
        return self.first_at + (self.arrival.output_tokens - self.output_tokens) * self._token_s(timing)

    def _kind(self, replica: Replica, now: float) -> Served:
        if now == self.arrival.at and replica.ready_at < now:
            return Served.WARM
        if replica.began_at < self.arrival.at or replica.ready_at < now:
            return Served.QUEUED
        return Served.DRAM if replica.tier is Tier.DRAM else Served.SSD

    def interrupt(self, timing: Timing, now: float) -> None:
        """Its replica is lost; its gateway has the tokens that came until now."""
        self.output_tokens = self.tokens_at(timing, now)
        self.replica = None
        self.losses += 1
        self.attempt += 1

    def _token_s(self, timing: Timing) -> float:
        return timing.token_s * self.arrival.pace

    def _first_s(self, timing: Timing) -> float:
        """From the grant to the first token that is new."""
        if self.losses:
            return self._rework_s(timing)
        return timing.prefill_token_s * self.arrival.prompt_tokens * self.arrival.pace

    def _rework_s(self, timing: Timing) -> float:
        if not self.losses:
            return 0.0
        tokens = self.arrival.prompt_tokens + self.output_tokens
        return timing.recompute_token_s * tokens + timing.recompute_s
