"""Recording: each snapshot that a plan was made from, with the plan, as a line of JSON (`sllm.sim.replay` reads them).

For evidence and for defects: what was decided, from what exactly. Snapshots are whole, so a record of a large cluster
grows fast; nothing is written unless a file is named. No prompts and no keys are in a snapshot.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from sllm.core.plain import to_plain
from sllm.core.snapshot import Snapshot
from sllm.errors import InvalidConfiguration
from sllm.scheduler.plan import Plan


class Recorder:
    """Appends to a file; without one, it does nothing."""

    def __init__(self, path: Path | None) -> None:
        """Raises InvalidConfiguration if the file cannot be written."""
        try:
            self._file = path.open("a", encoding="utf-8") if path is not None else None
        except OSError as error:
            raise InvalidConfiguration(f"cannot record to {path}: {error.strerror}") from error

    def planned(self, snapshot: Snapshot, now: float, plan: Plan) -> None:
        if self._file is not None:
            record = {"now": now, "snapshot": to_plain(snapshot), "plan": to_plain(plan)}
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
