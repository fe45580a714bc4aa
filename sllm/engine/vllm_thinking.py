"""How far a request has thought, for one that comes with output: vLLM's model runner V1 counts it step by step.

Its holder of thinking budgets sees the output grow by a token at a time, and takes output that is there at once for
another history. So it is shown the past as it was. (The model runner V2 looks at the tokens themselves.)
"""

from __future__ import annotations

import importlib
from typing import Any

from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

_MODULE = "vllm.v1.sample.thinking_budget_state"
_SEEN = "sllm_seen"


class ReplayingHolder(ThinkingBudgetStateHolder):
    """Replays what a request had before it came to this batch, once."""

    def _update_think_state(self, state: dict[str, Any]) -> None:
        if _SEEN not in state:
            state[_SEEN] = True
            output = state["output_tok_ids"]
            for length in range(len(output)):
                state["output_tok_ids"] = output[:length]
                super()._update_think_state(state)
                state["force_index"] = []
            state["output_tok_ids"] = output
        super()._update_think_state(state)


def install() -> None:
    module: Any = importlib.import_module(_MODULE)
    module.ThinkingBudgetStateHolder = ReplayingHolder
