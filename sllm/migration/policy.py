"""When to stop sending rounds: what a handover now would make the client wait, and whether one more round pays.

The destination keeps the KV cache of whole blocks only, so that a partly filled block is always computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from sllm.core.migration import RecomputeCost

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
    """What the client would wait between two tokens if the request moved now (paper §5.2: a * t + b).

    `covered_tokens` have been recomputed there in rounds.
    """
    missing = max(0, progress.tokens - cached(covered_tokens, road.block_size * progress.choices))
    return road.cost.fixed_s + road.cost.per_token_s * missing + road.round_trip_s


def pause_after_round_s(progress: Progress, covered_tokens: int, road: Road) -> float:
    """The same, after one more round: while it is computed the source decodes on."""
    round_s = pause_s(progress, covered_tokens, road)
    made = 0.0 if progress.interval_s <= 0 else round_s / progress.interval_s * progress.choices
    missing = progress.tokens % (road.block_size * progress.choices) + made
    return road.cost.fixed_s + road.cost.per_token_s * missing + road.round_trip_s


def pays(progress: Progress, covered_tokens: int, rounds: int, road: Road) -> bool:
    """True if one more round should be run before the handover.

    Not if the pause is within the request's own rhythm already, nor if the round would hardly shorten it. While nothing
    is known of the cost, the first round is what tells.
    """
    if rounds >= MAX_ROUNDS or progress.tokens < road.block_size:
        return False
    if road.cost.observations == 0:
        return rounds == 0
    now = pause_s(progress, covered_tokens, road)
    if now <= progress.interval_s:
        return False
    return pause_after_round_s(progress, covered_tokens, road) <= (1 - MIN_GAIN) * now
