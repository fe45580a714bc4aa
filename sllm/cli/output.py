"""The three forms of every answer: tables for people, JSON for programs, bare names for the shell. Data on stdout."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# Wide enough that nothing wraps where nobody looks at a terminal.
_UNBOUNDED = 4000


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    NAME = "name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns and their cells; `title` is printed where an answer has several tables, `empty` where there is no row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    empty: str = ""


def emit(form: Format, *, tables: Sequence[Table], data: Any, names: Sequence[str], note: str = "") -> None:
    """Print an answer in the form asked for; `note` is a line under the tables."""
    if form is Format.JSON:
        print(_json(data))
    elif form is Format.NAME:
        for name in names:
            print(one_line(name))
    else:
        sys.stdout.write(
            "\n".join([*(_rendered(table) for table in tables), *([f"{one_line(note)}\n"] if note else [])])
        )
        sys.stdout.flush()


def emit_line(form: Format, *, line: str, data: Any, name: str) -> None:
    """Print an answer that is one sentence for people."""
    emit_text = {Format.JSON: lambda: _json(data), Format.NAME: lambda: name}
    print(emit_text.get(form, lambda: line)(), flush=True)


def one_line(text: str) -> str:
    """Return `text` without line breaks and without what could move a terminal's cursor."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _json(data: Any) -> str:
    """Return JSON for people too: letters as they are, escapes for what could move a terminal's cursor."""
    lines = json.dumps(data, indent=2, ensure_ascii=False).split("\n")
    return "\n".join(line if line.isprintable() else _escaped(line) for line in lines)


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def _rendered(table: Table) -> str:
    # rich costs 60 ms to import; JSON and names do without.
    from rich.console import Console
    from rich.table import Table as RichTable

    title = f"{table.title}\n" if table.title else ""
    if not table.rows:
        return f"{title}{table.empty or '(none)'}\n"
    terminal = sys.stdout.isatty()
    width = None if terminal else _UNBOUNDED
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=width, markup=False, highlight=False, emoji=False
    )
    drawn = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        drawn.add_column(column, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(one_line(cell) for cell in row))
    with console.capture() as capture:
        console.print(drawn)
    return title + "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())
