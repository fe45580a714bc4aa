"""JSON that somebody else wrote. Pure."""

from __future__ import annotations

import json
from typing import Any

from sllm.errors import InvalidCheckpoint


def json_object(
    data: bytes, what: str, *, wrong: type[InvalidCheckpoint] = InvalidCheckpoint, unique: bool = True
) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises `wrong` if there is none, or if it is `unique` and one of the objects
    in it has a name twice: readers would differ in which value they take."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(found)
        if unique and len(values) != len(found):
            raise wrong(f"{what} has a name twice")
        return values

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise wrong(f"{what} is not JSON") from error
    if not isinstance(values, dict):
        raise wrong(f"{what} is not a JSON object")
    return values
