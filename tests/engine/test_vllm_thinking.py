"""A budget for thinking is counted alike, wherever its request has been."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.vllm

START, END, WORD, TWO = 1, 2, 3, 4
outputs = st.lists(st.sampled_from([START, TWO, END, WORD, WORD, WORD]), min_size=1, max_size=40)


class Batch:
    """A request in a batch: what the holder forces before each further token."""

    def __init__(self, holder_class: Any, prompt: list[int], budget: int, output: list[int]) -> None:
        import torch
        from vllm.v1.sample.logits_processor.interface import BatchUpdate

        marks = SimpleNamespace(reasoning_start_token_ids=[START, TWO], reasoning_end_token_ids=[END, TWO])
        self._holder = holder_class(marks, 4, 0, torch.device("cpu"), False)
        params = SimpleNamespace(thinking_token_budget=budget)
        added = [(0, params, prompt, output)]
        self._holder.sync_batch(BatchUpdate(batch_size=1, removed=[], added=added, moved=[]))

    def forced(self, output: list[int]) -> tuple[Any, ...]:
        self._holder.update_state([output], None)
        state = self._holder._state[0]
        return state["in_end"], list(state["force_index"]), state["end_count"]


@pytest.fixture(scope="module")
def thinking(vllm: SimpleNamespace) -> Any:
    return importlib.import_module("sllm.engine.vllm_thinking")


@settings(deadline=None)
@given(st.sampled_from([[WORD], [WORD, START, TWO], [START, TWO, WORD]]), st.integers(0, 12), outputs, st.data())
@example([WORD], 3, [WORD] * 5 + [START, TWO] + [WORD] * 8, None)
def test_a_request_that_comes_with_output_is_forced_as_if_it_had_always_been_there(
    thinking: Any, prompt: list[int], budget: int, output: list[int], data: st.DataObject | None
) -> None:
    cut = data.draw(st.integers(0, len(output) - 1)) if data else len(output) - 3
    there = Batch(thinking.ThinkingBudgetStateHolder, prompt, budget, [])
    undisturbed = [there.forced(output[:length]) for length in range(len(output))]
    came = Batch(thinking.ReplayingHolder, prompt, budget, output[:cut])
    assert [came.forced(output[:length]) for length in range(cut, len(output))] == undisturbed[cut:]


def test_vllms_own_would_take_it_for_another_history(thinking: Any) -> None:
    """When this fails `vllm_thinking` may not be needed any more."""
    output, prompt = [END, TWO, WORD], [WORD, START, TWO]  # it has ended by itself what it had no budget for
    there = Batch(thinking.ThinkingBudgetStateHolder, prompt, 0, [])
    undisturbed = [there.forced(output[:length]) for length in range(len(output) + 1)]
    came = Batch(thinking.ThinkingBudgetStateHolder, prompt, 0, output)
    assert came.forced(output) != undisturbed[-1]


def test_every_batch_has_one_that_replays(thinking: Any) -> None:
    module = importlib.import_module("vllm.v1.sample.thinking_budget_state")
    thinking.install()
    marks = SimpleNamespace(reasoning_start_token_ids=[START], reasoning_end_token_ids=[END])
    made = module.maybe_create_thinking_budget_state_holder(marks, 4, 0, None, False)
    assert isinstance(made, thinking.ReplayingHolder)
