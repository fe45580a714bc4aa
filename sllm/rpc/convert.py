"""Dataclasses <-> protobuf messages, by field name.

One generic pair of functions instead of a hand-written pair per noun: a field that one side lacks is an error at
first use, and the round-trip property test walks every message. The token protocol does not come through here: its
frames are converted by hand in `rpc/engine.py`, because they are hot.

Rules: `T | None` <-> field presence; `tuple[T, ...]` <-> repeated; `dict` <-> map; an enum member NAME <-> TYPE_NAME.
A protobuf enum number that this version does not know raises InvalidArgument: the peer is newer than we are. An enum
that defines `_missing_` says itself what such a number means.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import types
import typing
from typing import Any, TypeVar

from google.protobuf.message import Message

from sllm.errors import InvalidArgument

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    kind: typing.Literal["plain", "optional", "repeated", "map"]
    item: type


@functools.cache
def _fields(cls: Any) -> tuple[_Field, ...]:
    hints = typing.get_type_hints(cls)
    return tuple(_field(f.name, hints[f.name]) for f in dataclasses.fields(cls))


def _field(name: str, hint: Any) -> _Field:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return _Field(name, "repeated", _plain(args[0]))
    if origin is dict:
        return _Field(name, "map", _plain(args[1]))
    if origin in (types.UnionType, typing.Union):
        inner = next(a for a in args if a is not type(None))
        return _Field(name, "optional", _plain(inner))
    return _Field(name, "plain", _plain(hint))


def _plain(hint: Any) -> type:
    while hasattr(hint, "__supertype__"):  # NewType
        hint = hint.__supertype__
    return typing.cast(type, hint)


@functools.cache
def _enum_prefix(descriptor: Any) -> str:
    words = re.findall(r"[A-Z][a-z0-9]*", descriptor.name)
    return "_".join(words).upper() + "_"


def _enum_to_number(value: enum.Enum, descriptor: Any) -> int:
    return int(descriptor.values_by_name[_enum_prefix(descriptor) + value.name].number)


def _enum_from_number(cls: type[enum.Enum], number: int, descriptor: Any) -> Any:
    known = descriptor.values_by_number.get(number)
    name = known.name.removeprefix(_enum_prefix(descriptor)) if known else ""
    if name in cls.__members__:
        return cls[name]
    meant = cls._missing_(number)
    if meant is None:
        raise InvalidArgument(
            f"a peer sent {descriptor.name} {name or number}, which this version does not know",
            hint="upgrade this process to the peer's version",
        )
    return meant


def to_proto(value: Any, message_type: type[Message]) -> Message:
    """Return the protobuf message for a dataclass value."""
    message = message_type()
    fill(message, value)
    return message


def pack(value: Any, message_type: type[Message]) -> bytes:
    """Return the bytes of a dataclass value. Raises InvalidArgument for what no message can hold.

    Done before grpc is asked to send: an exception in a serialiser of grpc's would send an empty message instead.
    """
    try:
        return to_proto(value, message_type).SerializeToString()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{type(value).__name__} cannot be sent: {error}", hint="is all text in it valid Unicode?"
        ) from error


def fill(message: Message, value: Any) -> None:
    """Set every field of an empty `message` from the dataclass `value`."""
    for field in _fields(type(value)):  # type: ignore[arg-type]  # every class is hashable
        content = getattr(value, field.name)
        if content is None:
            continue
        if dataclasses.is_dataclass(field.item):
            _fill_messages(message, field, content)
        else:
            _fill_scalars(message, field, content)


def _fill_messages(message: Message, field: _Field, content: Any) -> None:
    target = getattr(message, field.name)
    if field.kind == "repeated":
        for item in content:
            fill(target.add(), item)
    else:
        target.SetInParent()
        fill(target, content)


def _fill_scalars(message: Message, field: _Field, content: Any) -> None:
    descriptor = message.DESCRIPTOR.fields_by_name[field.name]
    if field.kind == "map":
        getattr(message, field.name).update(content)
    elif field.kind == "repeated":
        getattr(message, field.name).extend(content)
    elif descriptor.enum_type is not None:
        setattr(message, field.name, _enum_to_number(content, descriptor.enum_type))
    else:
        setattr(message, field.name, content)


def from_proto(message: Message, cls: type[T]) -> T:
    """Return the dataclass value of a message. Raises InvalidArgument for what this version cannot understand."""
    try:
        fields = _fields(cls)  # type: ignore[arg-type]  # every class is hashable
        return cls(**{field.name: _read(message, field) for field in fields})
    except ValueError as error:
        raise InvalidArgument(f"a peer sent a wrong {cls.__name__}: {error}") from error


def _read(message: Message, field: _Field) -> Any:
    content = getattr(message, field.name)
    if field.kind == "repeated":
        nested = dataclasses.is_dataclass(field.item)
        return tuple(from_proto(item, field.item) if nested else item for item in content)
    if field.kind == "map":
        return dict(content)
    if field.kind == "optional" and not message.HasField(field.name):
        return None
    if dataclasses.is_dataclass(field.item):
        return from_proto(content, field.item)
    if issubclass(field.item, enum.Enum):
        enum_type = message.DESCRIPTOR.fields_by_name[field.name].enum_type
        assert enum_type is not None
        return _enum_from_number(field.item, content, enum_type)
    return content
