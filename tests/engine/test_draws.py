"""A generator brought to where draws would have brought it."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

VOCAB = 2048


@pytest.mark.parametrize("draws", [1, 2, 3, 15, 16, 17, 100, 5000])
def test_it_stands_where_a_samplers_single_draws_bring_it(draws: int) -> None:
    from sllm.engine.draws import advance

    drawn, advanced = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for _ in range(draws):
        torch.randint(0, 2**31, (1,), generator=drawn, dtype=torch.long)
    advance(advanced, draws, VOCAB)
    assert torch.equal(drawn.get_state(), advanced.get_state())


def test_thousands_of_draws_cost_less_than_a_step() -> None:
    from sllm.engine.draws import advance

    generator = torch.Generator().manual_seed(7)
    advance(generator, 1, VOCAB)
    started = time.process_time()
    advance(generator, 10_000, VOCAB)
    assert time.process_time() - started < 0.02
