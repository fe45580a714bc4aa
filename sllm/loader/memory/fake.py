"""A device whose memory is ordinary memory, with a copying thread of its own. For tests of the pipeline."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class FakeCopier:
    """`before(offset)` is called in the copying thread before each copy, and may block or raise."""

    def __init__(self, memory: memoryview, before: Callable[[int], None] = lambda offset: None) -> None:
        self.most_under_way = 0
        self.is_closed = False
        self._memory = memory
        self._before = before
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fake-device")
        self._under_way: deque[Future[None]] = deque()

    def begin(self, source: memoryview, offset: int) -> None:
        self._under_way.append(self._thread.submit(self._copy, source, offset))
        self.most_under_way = max(self.most_under_way, len(self._under_way))

    def end_oldest(self) -> None:
        self._under_way.popleft().result()

    def close(self) -> None:
        while self._under_way:
            with contextlib.suppress(Exception):
                self.end_oldest()
        self._thread.shutdown()
        self.is_closed = True

    def _copy(self, source: memoryview, offset: int) -> None:
        self._before(offset)
        self._memory[offset : offset + len(source)] = source
