"""Priority: which load of a node goes first in its loading queue."""

from __future__ import annotations

from enum import IntEnum


class Priority(IntEnum):
    """Why a checkpoint is loaded, the most urgent first. What is more urgent interrupts what is read for less; equals
    go in the order they came. Can only be raised: a load that a request once waited for goes on like that.
    """

    REQUEST = 0  # a request waits for it
    PREWARM = 1  # a replica that is wanted, though no request waits yet
    PREFETCH = 2  # it may be wanted

    @classmethod
    def _missing_(cls, value: object) -> Priority:
        """What a peer of another version says, and this one does not know, holds nobody up."""
        return cls.REQUEST
