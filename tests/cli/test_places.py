"""Places that cannot be written are named in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_state_folder_that_is_a_file_is_named_without_a_traceback(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.touch()
    command = [sys.executable, "-m", "sllm.cli.main", "dev", "--state", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert str(place) in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_under_the_output_is_said_without_a_traceback() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sllm.cli.main", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode != 0
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
