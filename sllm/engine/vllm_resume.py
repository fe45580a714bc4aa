"""How a request enters vLLM with output that it has had elsewhere: as if it had been preempted here.

vLLM's own interfaces take no output along: given as part of the prompt it would lose its part in penalties, min_tokens,
bad words, grammars, and the place in the sequence of random numbers. But a request that was preempted is computed anew
from prompt and output, kept apart, and goes on exactly. To look like one it takes three things:

- its `Request` is given the output as the scheduler gives it, step by step with its grammar (`replay`);
- the workers' model runner V1 makes its state of a new request from the prompt alone: the output travels there as
  part of it (`ResumedPrompt`), and is put where it belongs, the seeded generator and the budget for thinking too
  (`install`);
- the model runner V2 gets prompt and output apart, and its random numbers depend on seed and position: nothing to do.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.version import __version__ as version

from sllm.core.tokens import TokenRequest
from sllm.core.vllm_versions import TESTED_VERSIONS
from sllm.engine import vllm_thinking
from sllm.engine.base import Output
from sllm.engine.draws import advance
from sllm.engine.vllm_tokens import output_of
from sllm.errors import EngineFailed, InvalidArgument

_RUNNER = "vllm.v1.worker.gpu_model_runner"
_STATE_FIELDS = {"prompt_token_ids", "output_token_ids", "generator"}


class ResumedPrompt(list[int]):
    """A prompt, for all that vLLM sees, and the output that followed it."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        super().__init__(prompt)
        self.output = list(output)


def prompt_of(request: TokenRequest) -> list[int]:
    """Return the prompt as `replay` and the workers want it. The request has a prompt."""
    k = request.num_output_tokens
    return ResumedPrompt(request.token_ids[:-k], request.token_ids[-k:]) if k else request.token_ids


def replay(request: Any, grammars: StructuredOutputManager) -> None:
    """Bring vLLM's Request, just made, to where its output has brought it; not a resumed one stays as it is.

    Raises InvalidArgument if its grammar does not allow the output.
    """
    prompt = request.prompt_token_ids
    if not isinstance(prompt, ResumedPrompt):
        return
    request.prefill_stats = None  # told when it was first computed; the scheduler would not find them right
    if not request.use_structured_output:
        request.append_output_token_ids(prompt.output)
        return
    for token in prompt.output:  # one by one, as they came: it matters where reasoning ends and the grammar begins
        request.append_output_token_ids([token])
        if not grammars.accept_tokens(request, [token]):
            raise InvalidArgument("the output that the request has had does not follow its grammar")


def ended(request: Any, max_model_len: int) -> Output | None:
    """Return the end of a resumed request whose last token ends it already, by vLLM's own rules."""
    if not request.num_output_tokens or not check_stop(request, max_model_len):
        return None
    return output_of(
        EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            stop_reason=request.stop_reason,
        )
    )


def install(vocab_size: int) -> None:
    """Have this process' model runner V1 take resumed requests.

    Raises EngineFailed if this vLLM is not made as those that it was tested with.
    """
    runner: Any = importlib.import_module(_RUNNER)
    _check_seam(runner)
    runner.CachedRequestState = _state_class(vocab_size)
    vllm_thinking.install()


def _state_class(vocab_size: int) -> type[Any]:
    class ResumableState(CachedRequestState):
        """What the runner knows of a request, made from its prompt when it is new."""

        def __post_init__(self) -> None:
            _split(self, vocab_size)
            super().__post_init__()

    return ResumableState


def _split(state: Any, vocab_size: int) -> None:
    prompt = state.prompt_token_ids
    if isinstance(prompt, ResumedPrompt):
        state.prompt_token_ids, state.output_token_ids = list(prompt), list(prompt.output)
        if state.generator is not None:
            advance(state.generator, len(prompt.output), vocab_size)


def _check_seam(runner: Any) -> None:
    missing = sorted(_STATE_FIELDS - {field.name for field in dataclasses.fields(CachedRequestState)})
    missing += [] if hasattr(runner, "CachedRequestState") else ["CachedRequestState"]
    missing += [name for name in ("append_output_token_ids", "get_finished_reason") if not hasattr(Request, name)]
    if missing:
        raise EngineFailed(
            f"vLLM {version} is not made as this version of sllm expects: it has no {', '.join(missing)}",
            hint=f"pip install 'vllm=={TESTED_VERSIONS[-1]}'",
        )
