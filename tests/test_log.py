"""Log lines: JSON with a syslog priority for machines, and a tail for `sllm logs NODE`."""

import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from sllm.log import setup


@pytest.fixture(autouse=True)
def _root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_a_json_line_has_its_priority_and_its_exception(capsys: pytest.CaptureFixture[str]) -> None:
    setup(level="info", json_lines=True)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("x").exception("it broke")
    line = capsys.readouterr().err.strip()
    assert line.startswith("<3>")
    fields = json.loads(line[3:])
    assert fields["message"] == "it broke"
    assert "boom" in fields["exception"]


def test_times_are_utc_whatever_the_machine_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        setup(level="info", json_lines=True)
        logging.getLogger("x").info("now")
        said = json.loads(capsys.readouterr().err.strip()[3:])["time"]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert abs(datetime.fromisoformat(said) - datetime.now(UTC)) < timedelta(minutes=1)


def test_the_tail_keeps_the_last_lines() -> None:
    tail = setup(level="info", json_lines=False)
    for n in range(5):
        logging.getLogger("x").info("line %d", n)
    assert [line[-1] for line in tail.tail(2)] == ["3", "4"]
    assert list(tail.tail(0)) == []
