"""Failpoints are there for tests: one that no test dies at proves nothing."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "sllm"


def text_of(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))


def test_every_failpoint_is_tried() -> None:
    named = set(re.findall(r'failpoint\("([^"]+)"\)', text_of(SOURCE)))
    tried = text_of(TESTS)
    assert named
    assert {name for name in named if f'"{name}"' not in tried} == set()
