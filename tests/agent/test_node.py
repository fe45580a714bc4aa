"""What a node takes for itself."""

from __future__ import annotations

import psutil
import pytest

from sllm.agent.node import pool_bytes
from sllm.config import StoreConfig
from sllm.core.grant import POOL_BLOCK_BYTES
from sllm.errors import InvalidConfiguration


def test_the_pool_has_whole_blocks_and_at_least_one() -> None:
    assert pool_bytes(StoreConfig(dram_bytes=1)) == POOL_BLOCK_BYTES
    assert pool_bytes(StoreConfig(dram_bytes=3 * POOL_BLOCK_BYTES - 1)) == 2 * POOL_BLOCK_BYTES


def test_a_pool_that_is_not_configured_leaves_most_memory_to_others() -> None:
    assert 0 < pool_bytes(StoreConfig()) <= psutil.virtual_memory().total // 4


def test_a_pool_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="the machine has"):
        pool_bytes(StoreConfig(dram_bytes=1 << 60))
