"""The loader's bench still runs: a bench that nobody runs rots. Real forks and files; no engine, no peers, no root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"

pytestmark = pytest.mark.e2e


def quick(*arguments: str) -> str:
    command = [sys.executable, ROOT / "bench" / "loader.py", "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(400)
def test_every_case_runs_and_no_loader_of_ours_is_left_out() -> None:
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    output = quick("--rounds", "1")
    for case in ("fast", "slow", "lora", "moe", "dram", "breakdown", "random"):
        assert f"\n{case}\n" in output
    assert "left out: sllm" not in output
    assert before == {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}, "a smoke run wrote results"


def test_a_case_of_another_device_is_refused() -> None:
    command = [sys.executable, ROOT / "bench" / "loader.py", "--quick", "--case", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cuda is no case for --device cpu" in done.stderr
