"""Launch records and state folders."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.agent.folders import lock, prepare
from sllm.agent.logs import KEPT_FILES, prune, tail_lines
from sllm.agent.records import Records
from sllm.core.ids import ReplicaId
from sllm.core.launch import LaunchRecord
from sllm.errors import Conflict, InvalidConfiguration

REPLICA = ReplicaId("rep-000000000001")


@pytest.fixture
def record(make_spec: Callable[..., Any]) -> LaunchRecord:
    return LaunchRecord(
        replica=REPLICA, nonce="n", pid=1, start_ticks=2, address="127.0.0.1:1", spec=make_spec("sha256:0")
    )


def write(folder: Path, record: LaunchRecord) -> None:
    unfinished = folder / f".{record.replica}"
    unfinished.write_text(record.to_json())
    unfinished.rename(folder / f"{record.replica}.json")


async def test_a_record_is_seen_when_it_is_written(tmp_path: Path, record: LaunchRecord) -> None:
    records = Records(tmp_path)
    waiting = asyncio.create_task(records.wait_for(REPLICA, "n"))
    await asyncio.sleep(0)
    write(tmp_path, LaunchRecord(**{**fields(record), "nonce": "of another start"}))
    write(tmp_path, record)
    async with asyncio.timeout(5):
        assert await waiting == record
    assert await records.wait_for(REPLICA, "n") == record
    assert records.read_all() == (record,)
    records.remove(REPLICA)
    records.remove(REPLICA)
    assert records.read_all() == ()
    records.close()


def fields(record: LaunchRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in LaunchRecord.__dataclass_fields__}


async def test_what_is_no_record_is_removed(tmp_path: Path, record: LaunchRecord) -> None:
    records = Records(tmp_path)
    write(tmp_path, record)
    (tmp_path / "rep-torn.json").write_text('{"replica": "rep')
    (tmp_path / "rep-old.json").write_text("{}")
    assert records.read_all() == (record,)
    assert [path.name for path in tmp_path.iterdir()] == [f"{REPLICA}.json"]
    records.close()


def test_the_state_folder_is_for_this_user_and_one_agent(tmp_path: Path) -> None:
    folders = prepare(tmp_path / "state")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state", folders.run, folders.log)} == {0o700}
    lock(tmp_path / "state")
    with pytest.raises(Conflict, match="in use by another agent, process"):
        lock(tmp_path / "state")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfiguration, match="cannot make"):
        prepare(tmp_path / "file" / "state")


@pytest.mark.parametrize("lines", [0, 1, 3, 1000, 100_000])
def test_the_last_lines_of_a_log(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "rep-1.log"
    written = [f"line {number} {'x' * (number % 100)}\n" for number in range(5000)]
    path.write_text("".join(written))
    assert tail_lines(path, lines) == (written[-lines:] if lines else [])
    assert tail_lines(tmp_path / "absent", lines) == []


def test_old_logs_are_removed(tmp_path: Path) -> None:
    for number in range(KEPT_FILES + 3):
        (tmp_path / f"rep-{number}.log").touch()
    (tmp_path / "warm.log").touch()
    prune(tmp_path)
    assert len(list(tmp_path.iterdir())) == KEPT_FILES + 1
