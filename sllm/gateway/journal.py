"""Journal (pure): what this process knows of one token sequence, and the check that no token is lost or repeated.

Every output says at which position it begins. The one check that counts is here, at the reader: what is behind the
journal is dropped, what is ahead of it is an error.

It holds token ids and nothing else: no text, no logprobs. Its integers are those that the front end keeps too, so a
token costs eight bytes here, and a sequence has no more of them than its model's `max_model_len`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sllm.core.tokens import Logprobs, TokenOutput
from sllm.errors import EngineFailed


@dataclass(slots=True, kw_only=True, eq=False)
class Journal:
    """The prompt of a sequence and all output tokens received so far. With these it could be resumed anywhere."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)

    def accept(self, output: TokenOutput) -> TokenOutput | None:
        """Take in an output; return what of it is new, or None. Raises EngineFailed where tokens are missing."""
        have = len(self.tokens)
        if output.position == have:  # the usual case, and the hot one
            self.tokens += output.token_ids
            return output if output.prefill is None or not have else _without_prompt(output)
        if output.position > have:
            raise EngineFailed(f"the engine's output has a gap: token {have} was due, {output.position} came")
        return self._accept_overlap(output, seen=have - output.position)

    def _accept_overlap(self, output: TokenOutput, *, seen: int) -> TokenOutput | None:
        fresh = output.token_ids[seen:]
        self.tokens += fresh
        if not fresh and output.finish is None:
            return None
        return replace(
            _without_prompt(output),
            position=len(self.tokens) - len(fresh),
            token_ids=fresh,
            logprobs=_last_rows(output.logprobs, len(fresh)),
        )


def _without_prompt(output: TokenOutput) -> TokenOutput:
    """Return an output without what is told of a prompt, once, with the first token."""
    return replace(output, prompt_logprobs=None, prefill=None)


def _last_rows(logprobs: Logprobs | None, rows: int) -> Logprobs | None:
    if logprobs is None or rows == 0:
        return None
    cells = rows * logprobs.width
    return Logprobs(
        num_rows=rows,
        width=logprobs.width,
        token_ids=logprobs.token_ids[-cells:],
        values=logprobs.values[-cells:],
        ranks=logprobs.ranks[-rows:],
    )
