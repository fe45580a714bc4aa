"""StateStore: a small ordered key-value store with revisions, atomic conditional transactions and watches.

It holds intent only (deployments, operations, counters); what is observed lives in memory and is reported again.
Every transaction that changes something makes one new revision. Keys are text, ordered by their code points.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A stored value: made at revision `create_rev`, last written at `mod_rev`."""

    key: str
    value: bytes
    create_rev: int
    mod_rev: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Holds if the key was last written at `mod_rev`; 0: if it does not exist."""

    key: str
    mod_rev: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    key: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Deleting what is not there changes nothing."""

    key: str


Op = Put | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class TxnResult:
    """`revision` is the store's after the transaction, whether it took place or not."""

    succeeded: bool
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    """A key written (`value`), or deleted (`value` None), at `revision`."""

    key: str
    value: bytes | None
    revision: int


class StateStore(Protocol):
    """Used by one process at a time."""

    async def get(self, key: str) -> Item | None: ...

    async def range(self, prefix: str) -> tuple[tuple[Item, ...], int]:
        """Return the items whose keys begin with `prefix`, in order, and the revision they were read at."""
        ...

    async def txn(self, when: Sequence[Compare], then: Sequence[Op]) -> TxnResult:
        """Do all of `then` if all of `when` holds, else nothing. A key is written at most once in it."""
        ...

    def watch(self, prefix: str, *, from_rev: int) -> AsyncIterator[tuple[WatchEvent, ...]]:
        """Yield the events of each revision from `from_rev` on, without a gap, in order.

        Raises Conflict if revisions that old are not kept: read the range again and watch from there.
        """
        ...

    async def close(self) -> None: ...
