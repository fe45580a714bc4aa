"""Writes TOML: tables of strings, numbers, booleans and lists of them. (The standard library only reads it.)"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def dumps(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> str:
    """Return `values` as TOML; None is left out. A table's own keys come before the tables in it, as TOML demands."""
    own = [(key, value) for key, value in values.items() if value is not None and not isinstance(value, Mapping)]
    lines = [f"{_key(key)} = {_value(value)}\n" for key, value in own]
    if prefix and (own or not values):
        lines.insert(0, f"\n[{'.'.join(_key(part) for part in prefix)}]\n")
    tables = [(key, value) for key, value in values.items() if isinstance(value, Mapping)]
    return "".join(lines) + "".join(dumps(table, (*prefix, key)) for key, table in tables)


def _key(key: str) -> str:
    bare = key.replace("-", "").replace("_", "")
    return key if bare.isascii() and bare.isalnum() else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str | Path):
        return _string(str(value))
    raise TypeError(f"cannot write {type(value).__name__} as TOML")


def _string(text: str) -> str:
    # A JSON string is a TOML string, but for DEL, which TOML wants escaped, and surrogate pairs, which it refuses.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
