"""Recorded requests and lengths, from CSV files. Errors name the file and the line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sllm.errors import InvalidConfiguration
from sllm.sim.workload import Row

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""Of the Azure LLM inference traces (Patel et al., Splitwise, ISCA'24)."""


_MOST_DIGITS = 9
_SHOWN = 40  # of what is no number, so much is named


def read_trace(path: Path, *, requests: int | None = None, speed: float = 1.0) -> list[Row]:
    """Read the first `requests` of a trace (None: all), `speed` times as fast as they were recorded; the first comes at
    time 0. Raises InvalidConfiguration."""
    stamp, context, generated = TRACE_COLUMNS
    hint = f"a trace is CSV with the columns {', '.join(TRACE_COLUMNS)}"
    read = [
        (_time(path, line, row[stamp], hint), _tokens(path, line, row[context]), _tokens(path, line, row[generated]))
        for line, row in _lines(path, TRACE_COLUMNS, hint)
    ]
    read.sort(key=lambda entry: entry[0])
    first = read[0][0] if read else 0.0
    return [Row((at - first) / speed, prompt, max(1, output)) for at, prompt, output in read[:requests]]


def read_lengths(path: Path, *, prompt_column: str, output_column: str) -> list[tuple[int, int]]:
    """Read pairs of (prompt, output) tokens. Raises InvalidConfiguration."""
    columns = (prompt_column, output_column)
    hint = f"it needs a first line with the columns {prompt_column!r} and {output_column!r}"
    found = [
        (_tokens(path, line, row[prompt_column]), max(1, _tokens(path, line, row[output_column])))
        for line, row in _lines(path, columns, hint)
    ]
    if not found:
        raise InvalidConfiguration(f"{path} has no lengths", hint=hint)
    return found


def _lines(path: Path, columns: tuple[str, ...], hint: str) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
                raise InvalidConfiguration(f"{path} has no column {missing[0]!r}", hint=hint)
            for row in reader:
                yield reader.line_num, {column: row[column] or "" for column in columns}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        detail = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidConfiguration(f"cannot read {path}: {detail}", hint=hint) from error


def _time(path: Path, line: int, text: str, hint: str) -> float:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidConfiguration(f"{path}:{line}: {text!r} is not a time", hint=hint) from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _tokens(path: Path, line: int, text: str) -> int:
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise InvalidConfiguration(f"{path}:{line}: {text[:_SHOWN]!r} is not a number of tokens")
    return int(text)
