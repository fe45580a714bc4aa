"""Which requests cannot be answered because their answer is larger than a message may be. Pure.

A message that is too large would end the whole token stream, and with it the requests of everybody else on it.
"""

from __future__ import annotations

import json

from sllm.core.tokens import TokenRequest
from sllm.errors import InvalidArgument

# Logprobs of a prompt come in one message, of 16 MiB at most (sllm.rpc.transport).
MAX_PROMPT_LOGPROBS_BYTES = 12 << 20
_BYTES_EACH = 12  # token, rank and logprob, packed
_WHOLE_VOCABULARY = 1 << 17  # what -1 asks for; few models have more


def oversized(request: TokenRequest) -> InvalidArgument | None:
    """Return why a request is refused, if it is."""
    count = _prompt_logprobs(request.sampling_params)
    if count is None:
        return None
    each = (count if count >= 0 else _WHOLE_VOCABULARY) + 1  # the prompt's own token is always there
    size_bytes = len(request.token_ids) * each * _BYTES_EACH
    if size_bytes <= MAX_PROMPT_LOGPROBS_BYTES:
        return None
    return InvalidArgument(
        f"prompt_logprobs={count} over {len(request.token_ids)} tokens is more than one answer can hold",
        hint="ask for fewer, or with a shorter prompt",
    )


def _prompt_logprobs(sampling_params: bytes) -> int | None:
    """Return what was asked for; what cannot be read is the engine's to refuse."""
    if b"prompt_logprobs" not in sampling_params:
        return None
    try:
        params = json.loads(sampling_params)
    except (ValueError, RecursionError):
        return None
    count = params.get("prompt_logprobs") if isinstance(params, dict) else None
    return count if type(count) is int else None
