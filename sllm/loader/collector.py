"""Holds off Python's cyclic garbage collector for a while. Touches only that, for the whole process.

Making 10,000 tensors sets off collections; a full one walks all that torch has ever imported: 100 ms and more, with the
GIL held, so that reading stops too. A checkpoint of 100 MB is read in less than 20.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_guard = threading.Lock()
_holders = 0
_was_enabled = False


@contextlib.contextmanager
def held_off() -> Iterator[None]:
    """Collect nothing within; several threads may be within at once. What was off before stays off."""
    global _holders, _was_enabled
    with _guard:
        if _holders == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _guard:
            _holders -= 1
            if _holders == 0 and _was_enabled:
                gc.enable()
