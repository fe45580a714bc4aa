"""The journal: tokens arrive once each, in order, or it says so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.core.tokens import Finish, FinishReason, Logprobs, Prefill, TokenOutput
from sllm.errors import EngineFailed
from sllm.gateway.journal import Journal


def output(position: int, *tokens: int, **more: object) -> TokenOutput:
    return TokenOutput(stream_id=1, position=position, token_ids=list(tokens), **more)  # type: ignore[arg-type]


def test_output_in_order_passes_as_it_is() -> None:
    journal, first = Journal(prompt=[9]), output(0, 1, 2)
    assert journal.accept(first) is first
    assert journal.accept(output(2, 3)) is not None
    assert journal.tokens == [1, 2, 3]


def test_a_gap_is_an_error() -> None:
    journal = Journal(prompt=[9], tokens=[1])
    with pytest.raises(EngineFailed, match="token 1 was due, 2 came"):
        journal.accept(output(2, 3))
    assert journal.tokens == [1]


def test_what_was_seen_is_dropped() -> None:
    journal = Journal(prompt=[9], tokens=[1, 2, 3])
    assert journal.accept(output(1, 2, 3)) is None
    assert journal.tokens == [1, 2, 3]


def test_what_was_partly_seen_is_cut_with_its_logprobs() -> None:
    journal = Journal(prompt=[9], tokens=[1, 2])
    logprobs = Logprobs(
        num_rows=3, width=2, token_ids=[2, 7, 3, 7, 4, 7], values=[-1, -2, -3, -4, -5, -6], ranks=[1, 2, 3]
    )
    prefill = Prefill(num_prompt_tokens=1, num_cached_tokens=0)
    fresh = journal.accept(output(1, 2, 3, 4, logprobs=logprobs, prefill=prefill))
    assert fresh is not None
    assert (fresh.position, fresh.token_ids, fresh.prefill) == (2, [3, 4], None)
    assert fresh.logprobs == Logprobs(
        num_rows=2, width=2, token_ids=[3, 7, 4, 7], values=[-3, -4, -5, -6], ranks=[2, 3]
    )


def test_what_is_told_of_the_prompt_is_told_once() -> None:
    about = {
        "prefill": Prefill(num_prompt_tokens=1, num_cached_tokens=0),
        "prompt_logprobs": Logprobs(num_rows=1, width=1, token_ids=[9], values=[-1], ranks=[1]),
    }
    journal = Journal(prompt=[9])
    first = journal.accept(output(0, 1, **about))
    resumed = journal.accept(output(1, 2, **about))
    assert first == output(0, 1, **about)
    assert resumed == output(1, 2)


def test_the_end_passes_even_if_its_tokens_were_seen() -> None:
    journal = Journal(prompt=[9], tokens=[1])
    fresh = journal.accept(output(0, 1, finish=Finish(reason=FinishReason.STOP)))
    assert fresh is not None
    assert (fresh.token_ids, fresh.logprobs) == ([], None)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5))))
def test_whatever_arrives_no_token_is_lost_or_repeated(pieces: list[tuple[int, int]]) -> None:
    """Token i of the whole is i: whatever pieces come, what was accepted is 0, 1, 2, …"""
    journal = Journal(prompt=[])
    passed: list[int] = []
    for position, length in pieces:
        try:
            fresh = journal.accept(output(position, *range(position, position + length)))
        except EngineFailed:
            assert position > len(passed)
            continue
        passed += [] if fresh is None else fresh.token_ids
    assert passed == journal.tokens == list(range(len(passed)))
