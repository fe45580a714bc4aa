"""Values as JSON can hold them, and back: by the types of their fields, exactly.

For records that this version reads again (`sllm.controller.recording`); what crosses between processes is protobuf
(`sllm.rpc.convert`). Dataclasses are objects that say in `is` what they are; mappings whose keys are no text are lists
of pairs. Fields that are no part of a value (`compare=False`) are left out, and come back as their defaults.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
import typing
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_IS = "is"


def to_plain(value: Any) -> Any:
    """Return a value as dicts, lists, text and numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {_IS: type(value).__name__, **{name: to_plain(getattr(value, name)) for name in _hints(type(value))}}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {str(key): to_plain(content) for key, content in value.items()}
        return [[to_plain(key), to_plain(content)] for key, content in value.items()]
    if isinstance(value, Set):
        return sorted(to_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    return value


def from_plain(cls: type[T], plain: Any) -> T:
    """Return the value of a class that `to_plain` was given. Raises ValueError if it is no such."""
    try:
        return typing.cast(T, _read(cls, plain))
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"this is no {cls.__name__}: {error!r}") from error


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of the fields that make the value. (Of others the type may not be known at run time.)"""
    made = types.SimpleNamespace(__annotations__={f.name: f.type for f in fields(cls) if f.compare})
    return typing.get_type_hints(made, globalns=vars(sys.modules[cls.__module__]))


def _read(hint: Any, plain: Any) -> Any:
    while hasattr(hint, "__supertype__"):  # NewType
        hint = hint.__supertype__
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _read_one_of(arguments, plain)
    if origin is tuple:
        return _read_tuple(arguments, plain)
    if origin is frozenset:
        return frozenset(_read(arguments[0], item) for item in plain)
    if origin is not None and issubclass(origin, Mapping):
        pairs = plain.items() if isinstance(plain, dict) else plain
        return {_read(arguments[0], key): _read(arguments[1], content) for key, content in pairs}
    if is_dataclass(hint):
        made: Any = hint
        return made(**{name: _read(of, plain[name]) for name, of in _hints(made).items()})
    return hint(plain)  # an enum, text, or a number


def _read_tuple(arguments: tuple[Any, ...], plain: Any) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_read(arguments[0], item) for item in plain)
    return tuple(_read(of, item) for of, item in zip(arguments, plain, strict=True))


def _read_one_of(choices: tuple[Any, ...], plain: Any) -> Any:
    if plain is None:
        return None
    others = [choice for choice in choices if choice is not type(None)]
    if len(others) == 1:
        return _read(others[0], plain)
    return _read(next(choice for choice in others if choice.__name__ == plain[_IS]), plain)
