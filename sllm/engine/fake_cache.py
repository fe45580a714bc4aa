"""The fake engine's prefix cache: which prefixes were computed, in blocks, for each salt. It holds no values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

FAKE_BLOCK_SIZE = 16
_MAX_BLOCKS = 65_536  # the oldest go first


class PrefixCache:
    def __init__(self) -> None:
        self._blocks: dict[bytes, None] = {}

    def compute(self, token_ids: Sequence[int], cache_salt: str) -> int:
        """Have all full blocks of `token_ids` cached; return how many tokens were. The last token never is: what comes
        next is made by computing it."""
        cached = 0
        for end, block in _blocks(token_ids, cache_salt):
            if block in self._blocks and cached == end - FAKE_BLOCK_SIZE and end < len(token_ids):
                cached = end
            self._blocks.pop(block, None)
            self._blocks[block] = None  # now the youngest
        while len(self._blocks) > _MAX_BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        return cached


def _blocks(token_ids: Sequence[int], cache_salt: str) -> Iterator[tuple[int, bytes]]:
    """Yield the end of each full block, and a name for all tokens up to there."""
    digest = hashlib.blake2b(cache_salt.encode(), digest_size=16)
    for end in range(FAKE_BLOCK_SIZE, len(token_ids) + 1, FAKE_BLOCK_SIZE):
        digest.update(repr(token_ids[end - FAKE_BLOCK_SIZE : end]).encode())
        yield end, digest.digest()
