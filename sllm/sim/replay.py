"""Replay: what a controller has recorded, decided again. The same code decides the same, from the same snapshot.

A record is a file of JSON lines that the controller writes when its configuration names one (`record`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from sllm.core.plain import from_plain, to_plain
from sllm.core.snapshot import Snapshot
from sllm.errors import InvalidConfiguration
from sllm.sim.controller import Decide


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One plan, as values that JSON holds, and what it was made from."""

    line: int
    now: float
    snapshot: Snapshot
    plan: Any


def read_record(path: Path) -> Iterator[Recorded]:
    """Read a record. Raises InvalidConfiguration with the line that is wrong; a last line that was cut is left out."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.endswith("\n"):
                    yield _recorded(path, number, text)
    except OSError as error:
        raise InvalidConfiguration(f"cannot read {path}: {error.strerror}") from error


def differences(path: Path, decide: Decide) -> Iterator[tuple[Recorded, Any]]:
    """Decide again what was recorded, and return each plan that is another one now, beside what it is now."""
    for recorded in read_record(path):
        plan = to_plain(decide(recorded.snapshot, recorded.now, Random(0)))
        if plan != recorded.plan:
            yield recorded, plan


def _recorded(path: Path, number: int, text: str) -> Recorded:
    try:
        values = json.loads(text)
        return Recorded(
            line=number,
            now=float(values["now"]),
            snapshot=from_plain(Snapshot, values["snapshot"]),
            plan=values["plan"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidConfiguration(
            f"{path}:{number} is no plan of this version: {error}", hint="a record is read by the version that wrote it"
        ) from error
