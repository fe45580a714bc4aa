"""When to stop sending rounds: what a handover now would make the client wait, and whether one more round pays.

The destination keeps the KV cache of whole blocks only, so that a partly filled block is always computed again; and so
is the last token, whose block may be a whole one, because what comes next is made by computing it. So the round that is
to be the last is best sent just as a block has been filled: then hardly anything of a block is left to compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from sllm.core.migration import RecomputeCost
from sllm.migration.estimate import predicted_s

MAX_ROUNDS = 8  # the gap shrinks by the ratio of recomputing to decoding, 5-100x a round: three are usual
MIN_GAIN = 0.25  # a round must shorten the pause by this share, or it disturbs the destination for nothing
MIN_FILL_GAIN = 0.1  # the same for a round of a block or two, which disturbs it for a step
MAX_FILL_S = 5.0  # a block that takes longer to fill is not waited for
MAX_LAST_GAP = 0.25  # of a block: a round that leaves more than this to compute is not the last, and waits for nothing


class Next(Enum):
    """What a source does next."""

    ROUND = auto()  # send a round now
    FILL = auto()  # wait until the block is full, then send the last round
    HAND_OVER = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A request at one instant, as its source knows it: sums over its choices (n > 1, or several prompts).

    `tokens` are prompt and output; `interval_s` is the time between two tokens of the slowest choice, 0 while that is
    not known.
    """

    prompt_tokens: int
    output_tokens: int
    interval_s: float
    choices: int = 1

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


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
    after = _advanced(progress, _made(progress, pause_s(progress, covered_tokens, road)))
    return pause_s(after, progress.tokens, road)


def full(progress: Progress, block_size: int) -> int:
    """How many tokens a request of one choice has when the block that is being filled is full; now, if one has just
    been."""
    return -(-progress.tokens // block_size) * block_size


def fill_s(progress: Progress, block_size: int) -> float:
    """How long the source takes until then."""
    return (full(progress, block_size) - progress.tokens) * progress.interval_s


def following(progress: Progress, covered_tokens: int, rounds: int, road: Road, *, left_s: float) -> Next:
    """Say what comes next, with `left_s` seconds left to the migration and `rounds` done.

    No more rounds if the pause is within the request's own rhythm already, or if one would hardly shorten it. While
    nothing is known of the cost, the first round is what tells.
    """
    if left_s <= 0 or rounds >= MAX_ROUNDS:
        return Next.HAND_OVER
    if road.cost.observations == 0:
        worth_it = rounds == 0 and progress.tokens >= _block(progress, road)
        return Next.ROUND if worth_it else Next.HAND_OVER
    now = pause_s(progress, covered_tokens, road)
    if now <= progress.interval_s:
        return Next.HAND_OVER
    if _fill_pays(progress, covered_tokens, road, now, left_s):
        return Next.FILL
    return Next.ROUND if _round_pays(progress, covered_tokens, road, now) else Next.HAND_OVER


def _round_pays(progress: Progress, covered_tokens: int, road: Road, now: float) -> bool:
    if progress.tokens < _block(progress, road):
        return False
    return pause_after_round_s(progress, covered_tokens, road) <= (1 - MIN_GAIN) * now


def _fill_pays(progress: Progress, covered_tokens: int, road: Road, now: float, left_s: float) -> bool:
    """True if the round that is sent when the block is full can be the last: little is made while it is computed."""
    filling_s = fill_s(progress, road.block_size)
    # The blocks of several choices are not full at once.
    if progress.choices > 1 or progress.interval_s <= 0 or filling_s > min(MAX_FILL_S, left_s):
        return False
    filled = replace(progress, output_tokens=progress.output_tokens + full(progress, road.block_size) - progress.tokens)
    made = _made(filled, pause_s(filled, covered_tokens, road))
    if made > MAX_LAST_GAP * _block(progress, road):
        return False
    return pause_s(_advanced(filled, made), filled.tokens, road) <= (1 - MIN_FILL_GAIN) * now


def _made(progress: Progress, seconds: float) -> int:
    """How many tokens the source makes meanwhile."""
    return 0 if progress.interval_s <= 0 else int(seconds / progress.interval_s) * progress.choices


def _advanced(progress: Progress, tokens: int) -> Progress:
    return replace(progress, output_tokens=progress.output_tokens + tokens)


def _block(progress: Progress, road: Road) -> int:
    """How many tokens all choices have when each has a whole block."""
    return road.block_size * progress.choices
