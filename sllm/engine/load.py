"""How much a replica has to do, told to its agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sllm.engine.status import StatusBoard


class Load:
    """Publishes what `measure` returns (fields of HostStatus): at once, but at most once in `every_s`."""

    def __init__(self, board: StatusBoard, measure: Callable[[], dict[str, Any]], every_s: float) -> None:
        self._board = board
        self._measure = measure
        self._every_s = every_s
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._stopped = False

    def changed(self) -> None:
        if self._again is None and not self._stopped:
            self._publish()

    def stop(self) -> None:
        self._stopped = True
        if self._again is not None:
            self._again.cancel()

    def _publish(self) -> None:
        before = self._board.status
        self._board.update(**self._measure())
        # Look again later while there is something to see; otherwise the next change publishes.
        is_news = self._board.status is not before
        self._again = self._loop.call_later(self._every_s, self._publish) if is_news else None
