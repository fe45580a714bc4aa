"""Whether anything is loaded, for what is to rest meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Quiet:
    """Set by the event loop, waited for by threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_quiet = True

    def set(self, is_quiet: bool) -> None:
        with self._changed:
            self._is_quiet = is_quiet
            self._changed.notify_all()

    def notify(self) -> None:
        """Let those who wait look whether they are still to."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, unless: Callable[[], bool]) -> None:
        """In a thread: return when nothing is loaded, or when `unless` is true after a `notify`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_quiet or unless())
