"""At the source: what is known of a request that moves, and one round of it: its tokens to the destination."""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass

from sllm.core.migration import Round
from sllm.engine.requests import Sequence
from sllm.failpoints import failpoint
from sllm.migration.policy import Progress
from sllm.rpc.engine import EngineClient, RecomputeRequest


def progress_of(sequences: Sequenced[Sequence]) -> Progress:
    """Return where a request stands, of which these sequences are open (at least one)."""
    return Progress(
        prompt_tokens=sum(each.num_prompt_tokens for each in sequences),
        output_tokens=sum(each.position for each in sequences),
        interval_s=max(each.pace.interval_s or 0.0 for each in sequences),
        choices=len(sequences),
    )


def round_of(sequences: Sequenced[Sequence], generation: int) -> tuple[RecomputeRequest, ...]:
    """Return one round as it goes to a replica of that generation: all tokens so far, a message for each sequence."""
    return tuple(
        RecomputeRequest(
            request_id=each.request,
            generation=generation,
            token_ids=tuple(each.token_ids),
            cache_salt=each.cache_salt,
        )
        for each in sequences
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """`round_trip_s`: what the round took beyond the destination's own work."""

    round: Round
    round_trip_s: float


async def ask(client: EngineClient, requests: Sequenced[RecomputeRequest], timeout_s: float) -> Answered:
    """Have a round computed, one sequence after the other: the later ones find the prompt in the cache.

    Raises what the destination answers, Unavailable and DeadlineExceeded included.
    """
    began = time.monotonic()
    failpoint("round-sent")
    rounds = [await client.recompute(request, timeout_s=timeout_s) for request in requests]
    failpoint("round-answered")
    seconds = sum(each.seconds for each in rounds)
    return Answered(
        round=Round(
            tokens=sum(each.tokens for each in rounds),
            cached_tokens=sum(each.cached_tokens for each in rounds),
            seconds=seconds,
        ),
        round_trip_s=max(0.0, time.monotonic() - began - seconds),
    )


def wire_bytes(requests: Sequenced[RecomputeRequest]) -> int:
    """Return what a round's tokens take on the wire: a varint each (proto3)."""
    return sum(max(1, -(-token.bit_length() // 7)) for request in requests for token in request.token_ids)
