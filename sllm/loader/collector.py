"""Holds off Python's cyclic garbage collector for a while. Touches only that, for the whole process.

Making 10,000 tensors sets off collections; a full one walks all that torch has ever imported: 100 ms and more, with the
GIL held, so that reading stops too. A checkpoint of 100 MB is read in less than 20.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

_guard = threading.Lock()
_holders: set[object] = set()
_was_enabled = False


@contextlib.contextmanager
def held_off() -> Iterator[None]:
    """Collect nothing within; several threads may be within at once. What was off before stays off."""
    global _was_enabled
    holder = object()
    with _guard:
        if not _holders:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders.add(holder)
    try:
        yield
    finally:
        with _guard:
            if holder in _holders:  # else this is a child, forked within
                _holders.remove(holder)
                _give_back()


def _give_back() -> None:
    if not _holders and _was_enabled:
        gc.enable()


def _forked() -> None:
    """Give a child its collector: the threads that held it off are not in it."""
    if _holders:
        _holders.clear()
        _give_back()
    _guard.release()


# The guard is held across the fork, so that no child begins in the middle of a change.
os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_forked)
