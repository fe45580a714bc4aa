"""What the kernel is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sllm.errors import Conflict
from sllm.linux import claim, prctl, start_ticks


def test_what_the_kernel_refuses_is_an_error() -> None:
    with pytest.raises(OSError, match="prctl 123456"):
        prctl(123456, 0)


def test_a_file_has_one_claimant_who_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = claim(path, Conflict)
    with pytest.raises(Conflict, match=f"^{os.getpid()}$"):
        claim(path, Conflict)
    os.close(first)
    os.close(claim(path, Conflict))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_process_that_is_not_there_never_began() -> None:
    assert start_ticks(1 << 30) is None
    assert start_ticks(os.getpid()) == start_ticks(os.getpid())
