"""When to stop sending rounds: what a handover now would make the client wait, and whether one more round pays.

The destination keeps the KV cache of whole blocks only, so that a partly filled block is always computed again; and so
is the last token, whose block may be a whole one, because what comes next is made by computing it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sllm.core.migration import RecomputeCost
from sllm.migration.estimate import predicted_s

MAX_ROUNDS = 8  # the gap shrinks by the ratio of recomputing to decoding, 5-100x a round: three are usual
MIN_GAIN = 0.25  # a round must shorten the pause by this share, or it disturbs the destination for nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A request at one instant, as its source knows it. n > 1 choices are one request: sums, and the longest choice.

    `tokens` are prompt and output of all choices; `interval_s` is the time between two tokens of one choice, 0 while
    that is not known.
    """

    prompt_tokens: int
    output_tokens: int
    interval_s: float
    choices: int = 1

    @property
    def tokens(self) -> int:
        return self.prompt_tokens * self.choices + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """What lies between source and destination: cost of recomputing there, its block size, time there and back."""

    cost: RecomputeCost
    block_size: int
    round_trip_s: float = 0.0


def cached(tokens: int, block_size: int) -> int:
    """How many of the first `tokens` tokens the destination still has once it has computed them (whole blocks)."""
    return tokens // block_size * block_size


def pause_s(progress: Progress, covered_tokens: int, road: Road) -> float:
    """What the client would wait between two tokens if the request moved now: a * t + b, and the way there and back.

    `covered_tokens` have been recomputed there in rounds.
    """
    used = min(covered_tokens, progress.tokens - progress.choices)
    missing = progress.tokens - cached(max(0, used), _block(progress, road))
    return predicted_s(road.cost, missing) + road.round_trip_s


def pause_after_round_s(progress: Progress, covered_tokens: int, road: Road) -> float:
    """The same, after one more round: while it is computed the source decodes on."""
    round_s = pause_s(progress, covered_tokens, road)
    made = 0 if progress.interval_s <= 0 else int(round_s / progress.interval_s) * progress.choices
    return pause_s(replace(progress, output_tokens=progress.output_tokens + made), progress.tokens, road)


def _block(progress: Progress, road: Road) -> int:
    """How many tokens all choices have when each has a whole block."""
    return road.block_size * progress.choices


def pays(progress: Progress, covered_tokens: int, rounds: int, road: Road) -> bool:
    """True if one more round should be run before the handover.

    Not if the pause is within the request's own rhythm already, nor if the round would hardly shorten it. While nothing
    is known of the cost, the first round is what tells.
    """
    if rounds >= MAX_ROUNDS or progress.tokens < _block(progress, road):
        return False
    if road.cost.observations == 0:
        return rounds == 0
    now = pause_s(progress, covered_tokens, road)
    if now <= progress.interval_s:
        return False
    return pause_after_round_s(progress, covered_tokens, road) <= (1 - MIN_GAIN) * now
