"""Recomputes as requests of vLLM's: greedy ones for a single token, which is thrown away.

They enter one at a time, and only while no request waits: a recompute prepares for one that may come, and each of its
tokens is computed in the time of those that are here. Where the scheduler does not divide prompts by itself (chunked
prefill is off on CPUs), a recompute enters in pieces, each of which finds those before it in the prefix cache: a long
one at once would keep every stream here, and who comes next, waiting for all of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from vllm.sampling_params import SamplingParams

from sllm.core.ids import RequestId
from sllm.core.tokens import Finish, FinishReason, Prefill, TokenRequest
from sllm.engine.base import Output
from sllm.errors import SllmError

PIECE_TOKENS = 128  # beside running requests: a step of theirs takes two or three times as long
ALONE_TOKENS = 1024  # as long as nobody is kept waiting: for a request that comes meanwhile


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entrance:
    """How requests enter the engine: `prepare` makes vLLM's Request, which `enter` gives the scheduler."""

    prepare: Callable[[int, TokenRequest, Any], Any]
    enter: Callable[[Any], None]


@dataclasses.dataclass(slots=True)
class _Held:
    """`prefill` is that of its first piece: what had been cached before."""

    token_ids: list[int]
    cache_salt: str
    prefill: Prefill | None = None


class Recomputes:
    """`whole`: the scheduler divides long ones by itself."""

    def __init__(self, entrance: Entrance, *, block_size: int, whole: bool) -> None:
        self._entrance = entrance
        self._block_size = block_size
        self._whole = whole
        self._held: dict[int, _Held] = {}
        # Pieces have keys of their own, below those of requests.
        self._keys = itertools.count(-1, -1)
        self._entered: tuple[int, int, bool] | None = None  # whose piece, its key, whether it is the last

    @property
    def held(self) -> bool:
        return bool(self._held) and self._entered is None

    def hold(self, key: int, token_ids: list[int], cache_salt: str) -> None:
        self._held[key] = _Held(token_ids, cache_salt)

    def forget(self, keys: Iterable[int]) -> list[int]:
        """Drop those among `keys` that are recomputes; return the key of a piece that the engine is to drop."""
        pieces = []
        for key in keys:
            self._held.pop(key, None)
            if self._entered is not None and key == self._entered[0]:
                pieces.append(self._entered[1])
                self._entered = None
        return pieces

    def enter(self, scheduler: Any) -> Output | None:
        """Let the next piece of the oldest one in if it is its turn; return its end if the engine does not take it."""
        running, waiting = scheduler.get_request_counts()
        if not self.held or waiting or running >= scheduler.max_num_running_reqs:
            return None
        key, held = next(iter(self._held.items()))
        try:
            self._enter(key, held, scheduler.kv_cache_manager, PIECE_TOKENS if running else ALONE_TOKENS)
        except SllmError as error:
            self.forget([key])
            return Output(key=key, token_ids=[], finish=Finish(reason=FinishReason.ERROR, error=error))
        return None

    def _enter(self, key: int, held: _Held, cache: Any, most_tokens: int) -> None:
        piece = next(self._keys)
        request = self._entrance.prepare(piece, _request(key, held, len(held.token_ids)), _params())
        end = self._end(cache, request, most_tokens)
        if end is not None:
            request = self._entrance.prepare(piece, _request(key, held, end), _params())
        self._entrance.enter(request)
        self._entered = (key, piece, end is None)

    def _end(self, cache: Any, request: Any, most_tokens: int) -> int | None:
        """Return where the next piece ends, behind a whole block; None: with the request."""
        if self._whole:
            return None
        blocks = max(1, most_tokens // self._block_size)
        cached = cache.get_computed_blocks(request)[1]
        end = (cached // self._block_size + blocks) * self._block_size
        return None if end >= request.num_tokens else int(end)

    def strip(self, output: Output) -> Output | None:
        """Return an output of a step: a recompute's without its token, None of one that is not done yet."""
        if self._entered is None or output.key != self._entered[1]:
            return output
        (key, _, last), self._entered = self._entered, None
        held = self._held[key]
        held.prefill = held.prefill or output.prefill
        failed = output.finish is not None and output.finish.error is not None
        if not (last or failed):
            return None
        del self._held[key]
        finish = output.finish if failed else Finish(reason=FinishReason.LENGTH)
        prefill = held.prefill and dataclasses.replace(held.prefill, num_prompt_tokens=len(held.token_ids))
        return dataclasses.replace(output, key=key, token_ids=[], finish=finish, prefill=prefill)


def _request(key: int, held: _Held, end: int) -> TokenRequest:
    return TokenRequest(
        stream_id=0,
        request_id=RequestId(f"recompute-{key}"),
        token_ids=held.token_ids[:end],
        sampling_params=b"",
        cache_salt=held.cache_salt,
    )


def _params() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
