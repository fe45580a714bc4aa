"""What keepers of child processes have in common."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from sllm.agent.supervision import Awaited, child_environment, keep_attempting, next_wait_s, output_to
from sllm.errors import Unavailable


async def test_attempts_go_on_whatever_became_of_the_last_one() -> None:
    loop = asyncio.get_running_loop()
    outcomes, last = [False, True, False], loop.create_future()

    async def attempt() -> bool:
        if outcomes:
            return outcomes.pop(0)
        last.set_result(None)
        return await loop.create_future()

    keeping = asyncio.create_task(keep_attempting(attempt, (0.0, 0.0)))
    await last
    keeping.cancel()


def test_waits_double_up_to_the_longest_and_begin_anew_once_a_process_was_ready() -> None:
    waits = [0.5]
    for was_ready in (False, False, False, True, False):
        waits.append(next_wait_s(waits[-1], was_ready, (0.5, 3.0)))
    assert waits[1:] == [1.0, 2.0, 3.0, 0.5, 1.0]


async def test_who_asks_while_there_is_none_gets_the_next_one() -> None:
    awaited: Awaited[str] = Awaited()
    asking = asyncio.create_task(awaited.get())
    assert not awaited.is_there
    awaited.has_come("first")
    assert (await asking, await awaited.get(), awaited.is_there) == ("first", "first", True)
    awaited.has_gone()
    assert not awaited.is_there
    asking = asyncio.create_task(awaited.get())
    awaited.has_gone()  # again: who waits already still gets the next one
    awaited.has_come("second")
    assert await asking == "second"


async def test_an_attempt_that_fails_fails_those_who_wait_and_no_later_ones() -> None:
    awaited: Awaited[str] = Awaited()
    asking = asyncio.create_task(awaited.get())
    await asyncio.wait([asking], timeout=0)
    awaited.fail(Unavailable("it does not start"))
    with pytest.raises(Unavailable, match="does not start"):
        await asking
    awaited.fail(Unavailable("nobody waits, and nobody is told"))
    awaited.has_come("next")
    assert await awaited.get() == "next"


async def test_who_stops_waiting_does_not_stop_the_others() -> None:
    awaited: Awaited[str] = Awaited()
    one, other = asyncio.create_task(awaited.get()), asyncio.create_task(awaited.get())
    await asyncio.wait([one, other], timeout=0)
    one.cancel()
    await asyncio.wait([one])
    awaited.has_come("here")
    assert await other == "here"


def test_a_child_has_its_own_scratch_and_no_supervisor_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("MINE", "kept")
    environment = child_environment(tmp_path / "scratch")
    assert environment["TMPDIR"] == str(tmp_path / "scratch")
    assert environment["MINE"] == "kept"
    assert "NOTIFY_SOCKET" not in environment


def test_output_is_appended_to_a_file_that_only_this_user_reads(tmp_path: Path) -> None:
    for line in (b"one\n", b"two\n"):
        with output_to(tmp_path / "log") as output:
            os.write(output, line)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
