"""On a terminal: a bar that goes away, bold headers; nothing of it in what a program reads."""

from __future__ import annotations

import os
import pty
import subprocess
import sys


def on_terminal(address: str, *args: str, stream: str) -> tuple[str, str]:
    """Run a command with one stream on a terminal; return what it wrote there, and on the other one."""
    master, slave = pty.openpty()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: slave}
    command = [sys.executable, "-m", "sllm.cli.main", *args, "--controller", address]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, **streams, env=environment, text=True) as process:
        os.close(slave)
        out, err = process.communicate(timeout=30)
    with os.fdopen(master, "rb", buffering=0) as terminal:
        # A pty holds a few KiB for its reader after the writer is gone.
        seen = terminal.read(65536).decode()
    return seen, (err if stream == "stdout" else out)


def test_progress_is_a_bar_and_the_answer_stays_alone_on_stdout(controller):
    terminal, out = on_terminal(controller.address, "delete", "demo", "-o", "name", stream="stderr")
    assert "delete demo" in terminal
    assert "\x1b[" in terminal
    assert out == "op-77aa\n"


def test_tables_have_bold_headers_and_stay_within_the_terminal(controller):
    terminal, err = on_terminal(controller.address, "nodes", stream="stdout")
    assert "\x1b[1mNAME" in terminal
    assert err == ""
