"""What the agent and the store process say to each other. Pure: packets <-> checked values.

One JSON object per packet of a SOCK_SEQPACKET Unix socket, `{"kind": NAME, ...fields}`; descriptors go with it where
the message says so. A packet that is not of this form is a `Malformed`, never more than the end of that connection.

    agent                                     store process
      Hello ------------------------------------->
      <----------------------------------- Holdings
      <------------------------------------- Welcome   + descriptor of the pool, for reading and writing
      Open --------------------------------------->    (Abandon calls it off while it has no answer)
      <------------------------------ Granted or Refused     Granted: + lease, feed (sllm.core.grant)
      Verify ------------------------------------->
      <-------------------- Verifying..., Verified or Refused
      Ping --------------------------------------->    every few seconds: one that is silent has hung
      <---------------------------------------- Pong
      Raise, Forget, Quit ------------------------>
      <----------- Holds, Gone, Kept, Loaded, Damaged, at any time
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from sllm.core.grant import Extent, Grant
from sllm.loader.memory.table import Entry
from sllm.version import VERSION

_PROTOCOL = 3
RELEASE = f"{VERSION}/{_PROTOCOL}"  # a store process of another one is replaced, its content taken over
MAX_PACKET_BYTES = 64 << 10  # what is larger goes in a memfd, see `channel`


class Malformed(Exception):
    """The other end does not speak this protocol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Begin: an agent that hears of another release than its own replaces the store process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Ask for a grant. `id` is the asker's; `folder` has the checkpoint's files; `checkpoint` is the digest that the
    content stands for; `priority` is one of sllm.core.priority. `deadline_s` seconds from now the load is called off
    for this asker; 0: never."""

    id: int
    digest: str
    checkpoint: str
    folder: str
    partition: int
    priority: int
    deadline_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Raise:
    """Whatever is loaded of a checkpoint, whoever asked for it, goes on at this priority if it had a worse one."""

    checkpoint: str
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """Free what the pool has of a content; who has been granted it keeps it."""

    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Verify the files on SSD of the content with this digest; it rests while anything is loaded. Abandon ends it."""

    id: int
    digest: str
    folder: str
    deep: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Quit:
    """End. With `keep` the next process takes the pool over; otherwise its memory goes, but for what is leased."""

    keep: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    release: str
    size_bytes: int
    huge: bool
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """All entries of the pool, and how much is kept back as Kept says: one message, however many there are."""

    entries: list[dict[str, Any]]
    kept_back_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """So many bytes of the pool are leased though their entry is gone, as far as was looked."""

    kept_back_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """An entry of the pool is new or has changed."""

    entry: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """With the descriptors of lease and feed."""

    id: int
    grant: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """An SllmError, as the answer to what has this id."""

    id: int
    reason: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A partition was read from SSD."""

    checkpoint: str
    size_bytes: int
    queue_s: float
    read_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """The files of a folder are not those of the content with this digest."""

    digest: str
    folder: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifying:
    id: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    id: int


Message = (
    Hello
    | Open
    | Abandon
    | Raise
    | Forget
    | Verify
    | Quit
    | Ping
    | Pong
    | Welcome
    | Holdings
    | Holds
    | Kept
    | Gone
    | Granted
    | Refused
    | Loaded
    | Damaged
    | Verifying
    | Verified
)
_KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in Message.__args__}
_HINTS = {kind: get_type_hints(kind) for kind in _KINDS.values()}
_PLAIN = {int: (int,), float: (int, float), str: (str,), bool: (bool,), list[dict[str, Any]]: (list,)}


def encode(message: Message) -> bytes:
    values = {name: getattr(message, name) for name in message.__slots__}
    return json.dumps({"kind": type(message).__name__.lower(), **values}).encode()


def decode(packet: bytes) -> Message:
    """Raises Malformed."""
    try:
        values = json.loads(packet)
        kind = _KINDS[values.pop("kind")]
        message: Message = kind(**values)
        for field in fields(kind):
            _check(_HINTS[kind][field.name], getattr(message, field.name))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from error
    return message


def _check(hint: Any, value: Any) -> None:
    kinds = _PLAIN.get(hint, (dict,))
    if type(value) not in kinds or (type(value) is int and abs(value) >= 1 << 63):
        raise ValueError(f"{str(value)[:40]!r} is no {hint}")
    if type(value) is list and any(type(row) is not dict for row in value):
        raise ValueError("a list of what are no objects")


def grant_of(entry: Entry, ready_chunks: int) -> dict[str, Any]:
    """Return the grant of an entry, as it is sent."""
    names = set(Grant.__slots__) - {"ready_chunks"}
    return {name: getattr(entry, name) for name in names} | {"ready_chunks": ready_chunks}


def grant_from(values: dict[str, Any]) -> Grant:
    """Raises Malformed."""
    try:
        return Grant(**{**values, "extents": tuple(Extent(*extent) for extent in values["extents"])})
    except (TypeError, KeyError) as error:
        raise Malformed(f"no grant: {error}") from error


def entry_from(values: dict[str, Any]) -> Entry:
    """Raises Malformed."""
    try:
        return Entry.from_json(values)
    except (ValueError, TypeError, KeyError) as error:
        raise Malformed(f"no entry: {error}") from error


def table_bytes(entries: Iterable[Entry]) -> bytes:
    """Return a whole table, as it is handed to a new store process."""
    return json.dumps([entry.as_json() for entry in entries]).encode()


def table_from(content: bytes) -> tuple[Entry, ...]:
    """Raises Malformed."""
    try:
        return tuple(entry_from(values) for values in json.loads(content))
    except (ValueError, TypeError) as error:
        raise Malformed(f"no table: {error}") from error
