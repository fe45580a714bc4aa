"""Failpoints are there for tests: one that no test dies at proves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "sllm"


def text_of(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))


def test_every_failpoint_is_tried() -> None:
    named = set(re.findall(r'failpoint\("([^"]+)"\)', text_of(SOURCE)))
    tried = text_of(TESTS)
    assert named
    assert {name for name in named if f'"{name}"' not in tried} == set()


def run_to(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = f"from sllm.failpoints import failpoint; failpoint('{name}'); print('passed')"
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_a_process_dies_at_the_failpoint_that_was_asked_for_and_at_no_other() -> None:
    assert run_to("here", {"SLLM_FAILPOINT": "here"}).returncode == -signal.SIGKILL
    assert run_to("there", {"SLLM_FAILPOINT": "here"}).stdout == "passed\n"


def test_a_failpoint_armed_by_a_file_hits_one_process_only(tmp_path: Path) -> None:
    armed = tmp_path / "failpoint"
    environment = {"SLLM_FAILPOINT": f"@{armed}"}
    assert run_to("here", environment).stdout == "passed\n", "not armed yet"
    armed.write_text("here KILL")
    assert run_to("there", environment).stdout == "passed\n"
    assert run_to("here", environment).returncode == -signal.SIGKILL
    assert run_to("here", environment).stdout == "passed\n", "one arming, one fault"
