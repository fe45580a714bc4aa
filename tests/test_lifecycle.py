"""Readiness to a supervisor, by systemd's protocol."""

import socket
from pathlib import Path

import pytest

from sllm import lifecycle


def test_a_supervisor_hears_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        lifecycle.notify(READY="1", X_ADDRESS="127.0.0.1:1")
        assert supervisor.recv(100) == b"READY=1\nX_ADDRESS=127.0.0.1:1"


def test_without_a_supervisor_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    lifecycle.notify(READY="1")


def test_a_supervisor_that_is_gone_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    lifecycle.notify(STOPPING="1")
    assert "cannot notify" in caplog.text


def test_scratch_files_are_kept_in_the_folder_given(tmp_path: Path) -> None:
    environment = lifecycle.scratch_environment(tmp_path / "scratch")
    assert set(environment.values()) == {str(tmp_path / "scratch")}
    assert "TMPDIR" in environment
    assert (tmp_path / "scratch").stat().st_mode & 0o777 == 0o700
