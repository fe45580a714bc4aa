"""Values of the token protocol <-> vLLM's own structs, exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from sllm.core.tokens import Finish, FinishReason, Logprobs, Prefill, TokenRequest
from sllm.engine.base import Output
from sllm.errors import EngineFailed, InvalidArgument

_PARAMS = {field.encode_name for field in msgspec.structs.fields(SamplingParams)}
_STRUCTURED = {field.name for field in dataclasses.fields(StructuredOutputsParams)}


def sampling_params(data: bytes) -> Any:
    """Decode `msgspec.json.encode(SamplingParams)`, the fields that a front end filled in included.

    Raises InvalidArgument for a field that this vLLM does not have: leaving it out would answer something else than
    what was asked.
    """
    try:
        fields = msgspec.json.decode(data, type=dict[str, Any])
        _check_fields("sampling parameters", fields, _PARAMS)
        _check_fields("structured outputs", fields.get("structured_outputs") or {}, _STRUCTURED)
        return msgspec.json.decode(data, type=SamplingParams)
    except (ValueError, VLLMClientError) as error:  # msgspec's errors are ValueErrors
        raise InvalidArgument(f"sampling parameters: {error}") from error


def check_for_vocabulary(params: Any, vocab_size: int) -> None:
    """Refuse what vLLM would only find out in the step, which would break the engine for everybody. A front end makes
    none of it, but it may be another version, or another model's. Raises InvalidArgument."""
    if params.seed is not None and not -(1 << 63) <= params.seed < 1 << 63:
        raise InvalidArgument(f"sampling parameters: seed {params.seed} has more than 64 bits")
    bad_words = params.bad_words_token_ids or []
    if not all(bad_words):
        raise InvalidArgument("sampling parameters: a bad word has no token")
    tokens = {token for word in bad_words for token in word}
    if params.min_tokens:
        tokens |= params.all_stop_token_ids
    if beyond := sorted(token for token in tokens if not 0 <= token < vocab_size):
        raise InvalidArgument(f"sampling parameters: token {beyond[0]} is not in the vocabulary of {vocab_size}")


def _check_fields(what: str, fields: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(fields) - known)
    if unknown:
        raise InvalidArgument(
            f"{what} have {', '.join(unknown)}, which this engine does not know",
            hint="gateway and node run different versions of vLLM",
        )


def engine_request(key: int, request: TokenRequest, prompt: list[int], params: Any) -> Any:
    """Return vLLM's struct for a request with `prompt`; its id is our key."""
    return EngineCoreRequest(
        request_id=str(key),
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=request.arrival_time,
        lora_request=None,
        cache_salt=request.cache_salt or None,
        data_parallel_rank=None,
        priority=request.priority,
        reasoning_ended=request.reasoning_ended,
    )


def output_of(output: EngineCoreOutput) -> Output:
    """Return our value for one request's share of a step."""
    return Output(
        key=int(output.request_id),
        token_ids=list(output.new_token_ids),
        finish=None if output.finish_reason is None else _finish(output),
        logprobs=_logprobs(output.new_logprobs),
        prompt_logprobs=_logprobs(output.new_prompt_logprobs_tensors),
        prefill=_prefill(output.prefill_stats),
    )


def _finish(output: EngineCoreOutput) -> Finish:
    reason = FinishReason[output.finish_reason.name]
    stop = output.stop_reason
    return Finish(
        reason=reason,
        stop_token_id=stop if isinstance(stop, int) else None,
        stop_string=stop if isinstance(stop, str) else None,
        error=EngineFailed("the engine gave up on the request") if reason is FinishReason.ERROR else None,
    )


def _logprobs(rows: Any) -> Logprobs | None:
    """Take LogprobsLists (arrays) or LogprobsTensors (tensors): (ids, values, ranks), the first two of 2 dimensions."""
    if rows is None:
        return None
    token_ids, values, ranks = rows[:3]
    num_rows, width = token_ids.shape
    return Logprobs(
        num_rows=num_rows,
        width=width,
        token_ids=token_ids.reshape(-1).tolist(),
        values=values.reshape(-1).tolist(),
        ranks=ranks.reshape(-1).tolist(),
    )


def _prefill(stats: Any) -> Prefill | None:
    if stats is None:
        return None
    return Prefill(num_prompt_tokens=stats.num_prompt_tokens, num_cached_tokens=stats.num_cached_tokens)
