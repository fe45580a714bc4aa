from __future__ import annotations

from sllm.controller import waits
from sllm.controller.waits import Wait, Waits


def wait(held_at: float) -> Wait:
    return Wait(deployment="app", replica="rep-1", held_at=held_at, granted_at=held_at + 1)


def test_only_the_last_are_remembered_and_each_as_it_last_waited(monkeypatch):
    monkeypatch.setattr(waits, "KEPT", 2)
    known = Waits()
    for number, request in enumerate(("req-1", "req-2", "req-1", "req-3")):
        known.granted(request, wait(float(number)))
    assert known.get("req-1") == wait(2.0)
    assert known.get("req-2") is None
    assert known.get("req-3") == wait(3.0)
