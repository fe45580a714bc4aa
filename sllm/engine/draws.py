"""Where a seeded generator stands after a sampler has drawn from it: reached at once, without the draws.

vLLM's model runner V1 draws from a request's generator once for each of its output tokens.
"""

from __future__ import annotations

import torch

# On a CPU the sampler asks for one number below this, from which it makes a row of noise by itself.
_CPU_DRAW_BELOW = 2**31


def advance(generator: torch.Generator, draws: int, vocab_size: int) -> None:
    """Bring `generator` to where `draws` output tokens bring it. Elsewhere than on a CPU a draw fills a row of
    `vocab_size` numbers, which moves a counter by a step that depends on that size alone."""
    if generator.device.type == "cpu":
        torch.randint(0, _CPU_DRAW_BELOW, (draws,), generator=generator, dtype=torch.long)
        return
    before = generator.get_offset()
    torch.empty(vocab_size, dtype=torch.float32, device=generator.device).exponential_(generator=generator)
    generator.set_offset(before + draws * (generator.get_offset() - before))
