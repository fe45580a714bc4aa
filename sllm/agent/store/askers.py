"""All who have asked for a grant and have no answer yet, wherever they wait: their deadlines and their leaving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from sllm.agent.store.channel import Channel
from sllm.agent.store.protocol import Message, Open, Refused
from sllm.errors import DeadlineExceeded, SllmError


class Asker:
    """An Open. `since` is when it came, in monotonic time; `is_waiting` ends with an answer, or without one when it was
    called off: whoever lists askers passes over those that no longer wait."""

    def __init__(self, channel: Channel, request: Open, on_settled: Callable[[Asker], None]) -> None:
        self.channel = channel
        self.request = request
        self.since = time.monotonic()
        self.is_waiting = True
        self._on_settled = on_settled
        self._timer: asyncio.TimerHandle | None = None

    @property
    def left_s(self) -> float | None:
        """Seconds to its deadline; None if it has none."""
        if self.request.deadline_s <= 0:
            return None
        return max(0.0, self.since + self.request.deadline_s - time.monotonic())

    def expire(self, on_late: Callable[[], None]) -> None:
        """Refuse it at its deadline, and call `on_late` then. To be called once."""
        if self.left_s is not None:
            self._timer = asyncio.get_running_loop().call_later(self.left_s, self._refuse_late, on_late)

    def answer(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        self.channel.send(message, fds)
        self.settle()

    def refuse(self, error: SllmError) -> None:
        """Answer with an error, if it still waits."""
        if self.is_waiting:
            self.answer(Refused(id=self.request.id, reason=error.reason, message=error.message, hint=error.hint))

    def settle(self) -> None:
        """It waits no more."""
        self.is_waiting = False
        if self._timer is not None:
            self._timer.cancel()
        self._on_settled(self)

    def too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.request.folder} was not loaded within {self.request.deadline_s:g} s")

    def _refuse_late(self, on_late: Callable[[], None]) -> None:
        self.refuse(self.too_late())
        on_late()


class Askers:
    """`on_left` is called when some have gone without a grant."""

    def __init__(self, on_left: Callable[[], None]) -> None:
        self._on_left = on_left
        self._waiting: set[Asker] = set()

    def add(self, channel: Channel, request: Open) -> Asker:
        asker = Asker(channel, request, self._waiting.discard)
        self._waiting.add(asker)
        asker.expire(self._on_left)
        return asker

    def raise_all(self, checkpoint: str, priority: int) -> None:
        """Let all who wait for a checkpoint go by a better priority, if it is one, also in loads yet to begin."""
        for asker in self._waiting:
            if asker.request.checkpoint == checkpoint:
                better = min(asker.request.priority, priority)
                asker.request = replace(asker.request, priority=better)

    def leave(self, channel: Channel, number: int | None = None) -> None:
        """One of a channel no longer wants an answer; without a `number` none of them does."""
        for asker in tuple(self._waiting):
            if asker.channel is channel and number in (None, asker.request.id):
                asker.settle()
        self._on_left()

    def close(self) -> None:
        for asker in tuple(self._waiting):
            asker.settle()
