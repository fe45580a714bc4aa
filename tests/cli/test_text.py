"""Small pieces of text: units, TOML, progress lines."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.cli import toml_text
from sllm.cli.output import one_line
from sllm.cli.progress import Lines
from sllm.cli.units import duration_s, size_text, time_text
from sllm.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("60s", 60), ("5m", 300), ("1h", 3600), ("2d", 172800), ("90", 90), ("1.5s", 1.5), ("0", 0)],
)
def test_durations_are_read(text, seconds):
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 s", "1w", "1m30s", "nan", "1e3s", "٣s"])
def test_other_durations_are_refused(text):
    with pytest.raises(InvalidArgument, match="is not a duration"):
        duration_s(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (14_000_000, "13.4 MiB"),
        (200 << 30, "200 GiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_sizes_are_written(size, text):
    assert size_text(size) == text


def test_times_are_iso_8601_in_utc():
    assert time_text(1_735_732_800.25) == "2025-01-01T12:00:00.250Z"
    assert time_text(0) is None


scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)
values = scalars | st.lists(scalars, max_size=3)
tables = st.recursive(
    st.dictionaries(st.text(st.characters(codec="utf-8")), values, max_size=4),
    lambda inner: st.dictionaries(st.text(st.characters(codec="utf-8")), values | inner, max_size=4),
    max_leaves=8,
)


@given(tables)
def test_toml_reads_as_it_was_written(table):
    assert tomllib.loads(toml_text.dumps(table)) == table


def test_toml_leaves_out_none_and_writes_paths_as_text():
    assert toml_text.dumps({"a": None, "b": Path("/x"), "c": {"d": None}}) == 'b = "/x"\n'


def test_one_line_has_no_line_breaks_and_no_control_characters():
    assert one_line("a\n  b\t\x1b[31mc\x07") == "a b [31mc"


def test_progress_lines_come_by_phase_and_by_tenth(capsys):
    lines = Lines("deploy demo")
    for share in (0.0, 0.05, 0.1, 0.11, 1.0):
        lines.update("loading", share)
    lines.update("building", None)
    lines.update("building", None)
    lines.update("", None)
    assert capsys.readouterr().err.splitlines() == [
        "deploy demo: loading 0%",
        "deploy demo: loading 10%",
        "deploy demo: loading 100%",
        "deploy demo: building",
    ]


def test_a_time_that_no_calendar_has_is_told_as_none():
    assert time_text(1e17) is None
