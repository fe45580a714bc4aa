"""Requests whose answer would not fit in a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sllm.core.tokens import TokenRequest
from sllm.engine.sizes import oversized


@pytest.mark.parametrize(
    ("tokens", "asked", "refused"),
    [(131_072, 20, True), (131_072, 1, False), (1000, 20, False), (1000, -1, True), (10**6, None, False)],
)
def test_only_logprobs_of_a_long_prompt_are_too_much(
    request_of: Callable[..., TokenRequest], tokens: int, asked: Any, refused: bool
) -> None:
    assert bool(oversized(request_of(1, [0] * tokens, prompt_logprobs=asked))) is refused


def test_what_cannot_be_read_is_the_engines_to_refuse(request_of: Callable[..., TokenRequest]) -> None:
    request = request_of(1, [0] * 10**6, prompt_logprobs="many")
    assert oversized(request) is None
