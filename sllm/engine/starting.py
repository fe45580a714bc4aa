"""How a start gets on, from a host that listens to one that serves: its phases, and how long each took."""

from __future__ import annotations

import time
from typing import Any

from sllm.core.replica import ReplicaState, StartPhase
from sllm.engine.status import StatusBoard


class Starting:
    """`begin` starts the clock of the board's first phase."""

    def __init__(self, board: StatusBoard) -> None:
        self._board = board
        self._since = time.monotonic()

    def begin(self) -> None:
        self._since = time.monotonic()

    def arrived(self, share: float) -> None:
        """A share of the weights is there. Loading ends with the last byte, though the engine was begun before."""
        if self._board.status.phase is not StartPhase.LOADING:
            return
        if share < 1.0:
            self._board.update(progress=share)
        else:
            self._enter(StartPhase.BUILDING, progress=0.0)

    def progressed(self, share: float) -> None:
        if self._board.status.phase is StartPhase.BUILDING:
            self._board.update(progress=share)

    def ready(self, memory_bytes: int) -> None:
        self.arrived(1.0)  # it may not have asked for all of them
        self._enter(StartPhase.READY, state=ReplicaState.READY, progress=1.0, memory_bytes=memory_bytes)

    def _enter(self, phase: StartPhase, **changes: Any) -> None:
        now, status = time.monotonic(), self._board.status
        phases_s = {**status.phases_s, status.phase.value: now - self._since}
        self._since = now
        self._board.update(phase=phase, phases_s=phases_s, **changes)
