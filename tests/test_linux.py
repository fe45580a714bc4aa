"""What the kernel is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sllm.errors import Conflict
from sllm.linux import claim, prctl, start_ticks

STEP_BACK = """
import os
from pathlib import Path
from sllm.linux import step_back
os.setsid()
step_back(7)
group = Path("/proc/self/autogroup")
print(os.nice(0), group.read_text() if group.exists() else "nice 7")
"""


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


@pytest.mark.parametrize("before", [0, 9])
def test_a_process_that_steps_back_does_so_with_its_session_and_never_steps_forward(before: int) -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    command = ["nice", "-n", str(before), sys.executable, "-c", STEP_BACK]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"{max(7, min(19, ours + before))} ")
    assert told.rstrip().endswith("nice 7")
