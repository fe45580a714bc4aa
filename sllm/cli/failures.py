"""How the command line tells of an error: `error: …` and `hint: …` on stderr, or one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from sllm.cli.output import Format, one_line
from sllm.errors import SllmError, outcome_of


@contextmanager
def reported(output: Format) -> Iterator[None]:
    """Print an error of the body in the form that `output` asks for, and exit with its code."""
    try:
        yield
    except SllmError as error:
        raise typer.Exit(report(error, as_json=output is Format.JSON)) from error


def report(error: SllmError, *, as_json: bool) -> int:
    """Print `error` and return the exit code that `sllm.errors` has for it."""
    if as_json:
        detail = {"reason": error.reason, "message": error.message, "hint": error.hint}
        print(json.dumps({"error": {**detail, "retry_after_s": error.retry_after_s}}), file=sys.stderr)
    else:
        print_failure(error.message, error.hint)
    return outcome_of(error).exit_code


def print_failure(message: str, hint: str) -> None:
    """Print one line, and a second one with the hint if there is one."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {one_line(hint)}", file=sys.stderr)
