"""The one logging setup: one line per event on stderr, JSON for machines (systemd), plain for people."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator

# systemd reads "<N>" at the start of a line as the syslog priority.
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_PLAIN = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s"
_TIME = "%Y-%m-%dT%H:%M:%S"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": f"{self.formatTime(record, _TIME)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return f"<{_PRIORITY.get(record.levelno, 6)}>" + json.dumps(fields, ensure_ascii=False)


class LogTail(logging.Handler):
    """Keeps the last lines in memory, so that `sllm logs NODE` works wherever the process writes its log."""

    def __init__(self, lines: int = 2000) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=lines)
        self.setFormatter(logging.Formatter(_PLAIN, _TIME))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))

    def tail(self, lines: int) -> Iterator[str]:
        """Yield the last `lines` lines, oldest first."""
        kept = list(self._lines)
        yield from kept[-lines:] if lines > 0 else ()


def setup(*, level: str, json_lines: bool) -> LogTail:
    """Configure the root logger of this process and return its tail."""
    logging.Formatter.converter = time.gmtime  # a cluster's logs are read side by side: UTC everywhere
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if json_lines else logging.Formatter(_PLAIN, _TIME))
    tail = LogTail()
    logging.basicConfig(level=level.upper(), handlers=[handler, tail], force=True)
    return tail
