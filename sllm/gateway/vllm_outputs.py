"""Values <-> vLLM's structures. With `vllm_frontend` the only module that knows their fields."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from vllm.sampling_params import SamplingType
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine import FinishReason as VllmFinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from sllm.core.tokens import FinishReason, Logprobs, Prefill, TokenOutput
from sllm.errors import InvalidArgument
from sllm.gateway.remote_engine import Order, Step

_FINISH: dict[FinishReason, Any] = {
    FinishReason.STOP: VllmFinishReason.STOP,
    FinishReason.LENGTH: VllmFinishReason.LENGTH,
    FinishReason.REPETITION: VllmFinishReason.REPETITION,
    # The front end makes an answer of "abort"; of "error" it makes an error.
    FinishReason.ABORT: VllmFinishReason.ERROR,
    FinishReason.ERROR: VllmFinishReason.ERROR,
}
# What resumes a request travels in fields of its own; a client must not be able to write it.
_OURS = "sllm_"


def order_of(request: Any, draw_seed: Callable[[], int]) -> Order:
    """Return what a front end asks its engine for (an EngineCoreRequest), as a value.

    What is to be sampled without a seed gets one of its own, so that any engine that goes on with it draws the same.
    """
    params = request.sampling_params
    return Order(
        key=request.request_id,
        prompt=request.prompt_token_ids or [],
        sampling_params=msgspec.json.encode(_seeded(_cleaned(params), draw_seed)),
        cache_salt=request.cache_salt or "",
        arrival_time=request.arrival_time,
        reasoning_ended=request.reasoning_ended,
        max_tokens=(params and params.max_tokens) or 0,
    )


def _seeded(params: Any, draw_seed: Callable[[], int]) -> Any:
    if params is None or params.sampling_type is not SamplingType.RANDOM:
        return params
    own = copy.copy(params)  # the front end shares one among the choices of a request
    own.seed = draw_seed()
    return own


def problem_with(request: Any) -> InvalidArgument | None:
    """Return why no engine here could carry out a request, if so."""
    assert isinstance(request, EngineCoreRequest)
    if request.pooling_params is not None or request.sampling_params is None:
        return InvalidArgument("only text generation is served")
    if request.mm_features or request.prompt_embeds is not None:
        return InvalidArgument("only text can be given: no images, audio or embeddings")
    if not request.prompt_token_ids:
        return InvalidArgument("the prompt is empty")
    return None


def _cleaned(params: Any) -> Any:
    extra = params.extra_args if params is not None else None
    if not extra or not any(name.startswith(_OURS) for name in extra):
        return params
    clone = params.clone()
    clone.extra_args = {name: value for name, value in extra.items() if not name.startswith(_OURS)}
    return clone


def outputs_of(step: Step) -> Any:
    """Return a step as EngineCoreOutputs."""
    outputs = [_output(key, output) for key, output in step.batch]
    return EngineCoreOutputs(outputs=outputs, timestamp=step.timestamp)


def _output(key: str, output: TokenOutput) -> Any:
    made = EngineCoreOutput(request_id=key, new_token_ids=output.token_ids)
    if output.logprobs is not None:
        made.new_logprobs = _lists(output.logprobs)
    if output.prompt_logprobs is not None:
        made.new_prompt_logprobs_tensors = _tensors(output.prompt_logprobs)
    if output.prefill is not None:
        made.prefill_stats = _prefill(output.prefill)
    if (finish := output.finish) is not None:
        made.finish_reason = _FINISH[finish.reason]
        made.stop_reason = finish.stop_string if finish.stop_token_id is None else finish.stop_token_id
    return made


def _lists(logprobs: Logprobs) -> Any:
    shape = (logprobs.num_rows, logprobs.width)
    return LogprobsLists(
        np.array(logprobs.token_ids, dtype=np.int64).reshape(shape),
        np.array(logprobs.values, dtype=np.float32).reshape(shape),
        np.array(logprobs.ranks, dtype=np.int64),
    )


def _tensors(logprobs: Logprobs) -> Any:
    shape = (logprobs.num_rows, logprobs.width)
    return LogprobsTensors(
        torch.tensor(logprobs.token_ids, dtype=torch.int64).reshape(shape),
        torch.tensor(logprobs.values, dtype=torch.float32).reshape(shape),
        torch.tensor(logprobs.ranks, dtype=torch.int64),
    )


def _prefill(prefill: Prefill) -> Any:
    return PrefillStats(
        num_prompt_tokens=prefill.num_prompt_tokens,
        num_computed_tokens=prefill.num_prompt_tokens - prefill.num_cached_tokens,
        num_cached_tokens=prefill.num_cached_tokens,
        num_local_cached_tokens=prefill.num_cached_tokens,
    )
