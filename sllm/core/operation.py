"""Operation: long work that somebody asked for, with its progress and its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sllm.core.ids import OperationId


class OperationState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`kind` is the verb (`deploy`, `checkpoint.add`, …), `target` the name it works on.

    `phase` is a short text for people, `progress` the done share 0..1 of the phase, or None where it is not known.
    """

    id: OperationId
    kind: str
    target: str
    state: OperationState
    phase: str = ""
    progress: float | None = None
    error: str = ""
    error_reason: str = ""
    hint: str = ""
    created_at: float = 0.0
    updated_at: float = 0.0
