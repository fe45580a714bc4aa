"""Seeded generators on a real GPU: `make test-gpu`. Not yet run."""

from __future__ import annotations

import pytest

from sllm.engine.draws import advance

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("vocab_size", [2048, 32_000, 151_936, 1_000_003])
def test_a_generator_stands_where_draws_of_a_row_of_noise_bring_it(vocab_size: int) -> None:
    drawn, advanced = (torch.Generator(device="cuda").manual_seed(7) for _ in range(2))
    noise = torch.empty(3, vocab_size, device="cuda")
    for _ in range(37):
        noise[1].exponential_(generator=drawn)
    advance(advanced, 37, vocab_size)
    assert drawn.get_offset() == advanced.get_offset()
    ours, theirs = torch.empty(vocab_size, device="cuda"), torch.empty(vocab_size, device="cuda")
    assert torch.equal(ours.exponential_(generator=drawn), theirs.exponential_(generator=advanced))
