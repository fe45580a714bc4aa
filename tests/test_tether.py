"""A tethered command ends with its parent."""

from __future__ import annotations

import signal
import subprocess
import sys

from sllm import tether

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")


def test_a_tethered_command_ends_with_its_parent() -> None:
    code = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, {tether.__file__!r}, str(os.getpid()), "15", *{list(SLEEP)!r}])
print("started", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        parent.kill()
        # The child has the pipe too: it ends when both have.
        assert parent.communicate(timeout=20) == (b"", None)


def test_a_tether_does_not_start_a_command_whose_parent_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, tether.__file__, "1", "15", "/bin/echo", "never"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""


def test_a_command_that_cannot_be_started_is_told_of() -> None:
    done = subprocess.run([*tether.tethered(["/no/such/command"], signal.SIGTERM)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: could not be started: No such file or directory\n"
