"""Progress of long work on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from sllm.cli.output import one_line

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_STEP = 0.1  # a log wants a line per phase and per tenth of it, not one per chunk


class Progress(Protocol):
    def update(self, phase: str, share: float | None) -> None:
        """Say where the work is: the phase's name, and the done share of it (0..1) where that is known."""


@contextmanager
def open_progress(title: str) -> Iterator[Progress]:
    """Yield the right kind of progress for stderr; it is gone from a terminal afterwards."""
    if not sys.stderr.isatty():
        yield Lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bar(title, bars)


class Lines:
    """Plain lines, only when the phase changes or a tenth of it more is done."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._last: tuple[str, int] = ("", -1)

    def update(self, phase: str, share: float | None) -> None:
        step = -1 if share is None else int(share / _STEP + 1e-9)
        if not phase or (phase, step) == self._last:
            return
        self._last = (phase, step)
        percent = "" if share is None else f" {share:.0%}"
        print(one_line(f"{self._title}: {phase}{percent}"), file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, title: str, bars: RichProgress) -> None:
        self._title = title
        self._bars = bars
        self._task = bars.add_task(title, total=None)

    def update(self, phase: str, share: float | None) -> None:
        description = one_line(f"{self._title}: {phase}" if phase else self._title)
        total = None if share is None else 1.0
        self._bars.update(self._task, description=description, total=total, completed=share or 0.0)
