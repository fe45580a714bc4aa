"""Units as people write and read them: durations, sizes, times."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from sllm.errors import InvalidArgument

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d|)")


def duration_s(text: str) -> float:
    """Return `500ms`, `60s`, `5m`, `1h`, `2d` in seconds; a bare number is seconds. Raises InvalidArgument."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(f"{text!r} is not a duration", hint="write for example 500ms, 60s, 5m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def size_text(size_bytes: int) -> str:
    """Return a size in binary units with three digits or so: `13.4 MiB`."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def time_text(seconds: float) -> str | None:
    """Return a time since the epoch in ISO 8601 UTC; 0 means that it never happened: None, as is one
    that no calendar has."""
    if seconds <= 0:
        return None
    try:
        text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return None
    return text.replace("+00:00", "Z")
