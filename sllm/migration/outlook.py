"""What is expected of a request that runs, if it moved to a replica on devices like those that it is on. Pure."""

from __future__ import annotations

from sllm.core.migration import Outlook, RecomputeCost
from sllm.migration.estimate import predicted_s
from sllm.migration.policy import Progress, Road, pause_s

# Engines have block sizes of their own; a forecast of the pause needs no more than their magnitude.
BLOCK_TOKENS = 16
ROUND_TRIP_S = 0.005
# From the decision to the first round: controller, agent, engine host, and back. What ends sooner is let end.
OVERHEAD_S = 0.25


def outlook(progress: Progress, cost: RecomputeCost, *, left_tokens: float | None, moves: int) -> Outlook:
    """`left_tokens`: how many more it is expected to have; None: nobody knows."""
    road = Road(cost=cost, block_size=BLOCK_TOKENS, round_trip_s=ROUND_TRIP_S)
    pause = pause_s(progress, progress.tokens, road)
    left_s = None if left_tokens is None or progress.interval_s <= 0 else left_tokens * progress.interval_s
    return Outlook(
        pause_s=pause,
        move_s=OVERHEAD_S + predicted_s(cost, progress.tokens) + pause,
        left_s=left_s,
        moves=moves,
    )
