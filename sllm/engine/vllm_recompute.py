"""Recomputes as requests of vLLM's: a greedy one for a single token, which is thrown away.

They enter one at a time, and only while no request waits: a recompute prepares for one that may come, and each of its
tokens is computed in the time of those that are here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from vllm.sampling_params import SamplingParams

from sllm.core.ids import RequestId
from sllm.core.tokens import Finish, FinishReason, TokenRequest
from sllm.engine.base import Output


class Recomputes:
    def __init__(self) -> None:
        self._held: dict[int, TokenRequest] = {}
        self._entered: int | None = None

    @property
    def held(self) -> bool:
        return bool(self._held)

    def hold(self, key: int, token_ids: list[int], cache_salt: str) -> None:
        self._held[key] = TokenRequest(
            stream_id=0,
            request_id=RequestId(f"recompute-{key}"),
            token_ids=token_ids,
            sampling_params=b"",
            cache_salt=cache_salt,
        )

    def forget(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._held.pop(key, None)
            if key == self._entered:
                self._entered = None

    def enter(self, scheduler: Any, add: Callable[[int, TokenRequest, Any], None]) -> None:
        """Let the oldest one in if it is its turn."""
        running, waiting = scheduler.get_request_counts()
        if not self._held or self._entered is not None or waiting or running >= scheduler.max_num_running_reqs:
            return
        self._entered = next(iter(self._held))
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        add(self._entered, self._held.pop(self._entered), params)

    def strip(self, output: Output) -> Output:
        """Return an output of a step, without its token if it is a recompute's."""
        if output.key != self._entered:
            return output
        self._entered = None
        if output.finish is not None and output.finish.error is not None:
            return output
        return dataclasses.replace(output, token_ids=[], finish=Finish(reason=FinishReason.LENGTH))
