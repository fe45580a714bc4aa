"""One child process kept running."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from sllm.cli.local.notifications import Notifications, parse
from sllm.cli.local.supervisor import Backoff, Child, Program
from sllm.errors import DeadlineExceeded, OperationFailed

READY = 'line = hello("it"); notify("READY=1", "X_ADDRESS=127.0.0.1:5"); signal.pause()'
AT_ONCE = Backoff(first_s=0.01, most_s=0.02)


class Room:
    """A supervisor's surroundings: children that are ended with the test, and what was said."""

    def __init__(self, tmp_path: Path) -> None:
        self.log = tmp_path / "log" / "it.log"
        self.notifications = Notifications()
        self.said: list[str] = []
        self.told: asyncio.Queue[str] = asyncio.Queue()
        self.children: list[Child] = []

    def say(self, text: str) -> None:
        self.said.append(text)
        self.told.put_nowait(text)

    def child(
        self, argv: tuple[str, ...], backoff: Backoff = AT_ONCE, start_s: float = 30, stop_s: float = 30
    ) -> Child:
        program = Program(name="it", argv=argv, log=self.log, start_s=start_s, stop_s=stop_s)
        child = Child(program, self.notifications, self.say, backoff)
        self.children.append(child)
        return child


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    room = Room(tmp_path)
    yield room
    for child in room.children:
        child.kill()
        await child.stop()
    room.notifications.close()


async def test_start_returns_what_the_child_says_once_it_is_ready(
    room: Room, meetings, stand_in: Callable[[str], tuple]
):
    fields = await room.child(stand_in(READY)).start()
    assert fields == {"READY": "1", "X_ADDRESS": "127.0.0.1:5"}


async def test_a_child_that_ends_before_it_is_ready_is_told_in_its_own_words(room, stand_in):
    child = room.child(stand_in('sys.exit("noise\\nerror: the port is taken\\nhint: choose another")'))
    with pytest.raises(OperationFailed, match="it did not start: the port is taken") as caught:
        await child.start()
    assert caught.value.hint == "choose another"


async def test_words_of_an_earlier_run_are_not_taken_for_the_reason(room, stand_in):
    room.log.parent.mkdir()
    room.log.write_text("error: of yesterday\n")
    with pytest.raises(OperationFailed, match="it did not start: ended with exit code 3") as caught:
        await room.child(stand_in("sys.exit(3)")).start()
    assert str(room.log) in caught.value.hint


async def test_a_program_that_cannot_be_run_is_an_error(room, tmp_path):
    with pytest.raises(OperationFailed, match="could not be started: No such file"):
        await room.child((str(tmp_path / "none"),)).start()


async def test_a_child_that_is_never_ready_is_not_waited_for_for_ever(room, stand_in):
    with pytest.raises(DeadlineExceeded, match=r"it is not ready after 0\.05 s"):
        await room.child(stand_in("signal.pause()"), start_s=0.05).start()


async def test_a_killed_child_is_started_again(room, meetings, stand_in):
    child = room.child(stand_in(READY))
    await child.start()
    first = await meetings.next()
    os.kill(first.pid, signal.SIGKILL)
    second = await meetings.next()
    assert second.pid != first.pid
    assert child.pid == second.pid
    assert await room.told.get() == "it was killed by SIGKILL; starting it again in 0.01 s"
    assert await room.told.get() == "it is ready again"


async def test_each_death_in_a_row_doubles_the_wait(room, meetings, stand_in):
    child = room.child(stand_in(READY))
    await child.start()
    for _ in range(3):
        os.kill((await meetings.next()).pid, signal.SIGKILL)
    await meetings.next()
    assert [said.rsplit(" in ")[1] for said in room.said if "starting" in said] == ["0.01 s", "0.02 s", "0.02 s"]


async def test_after_a_long_life_the_wait_begins_anew(room, meetings, stand_in):
    child = room.child(stand_in(READY), Backoff(first_s=0.01, most_s=10, steady_s=0))
    await child.start()
    for _ in range(2):
        os.kill((await meetings.next()).pid, signal.SIGKILL)
    await meetings.next()
    assert [said.rsplit(" in ")[1] for said in room.said if "starting" in said] == ["0.01 s", "0.01 s"]


async def test_stop_lets_it_end_by_itself_and_does_not_start_it_again(room, meetings, stand_in):
    child = room.child(stand_in(READY))
    await child.start()
    met = await meetings.next()
    await child.stop()
    assert await met.says() == "stopping"
    await met.ends()
    assert child.pid is None
    assert room.said == []


async def test_stop_kills_what_does_not_end_with_its_process_group(room, meetings, stand_in):
    child = room.child(
        stand_in(
            "child = os.fork()\n"
            "line = hello('it' if child else 'grandchild'); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "if child: notify('READY=1')\n"
            "signal.pause()"
        ),
        stop_s=0.05,
    )
    await child.start()
    both = [await meetings.next(), await meetings.next()]
    await child.stop()
    for met in both:
        await met.ends()
    assert room.said == ["it does not end; killing it"]


async def test_stop_while_it_waits_to_start_again_is_at_once(room, meetings, stand_in):
    child = room.child(stand_in(READY), Backoff(first_s=1000, most_s=1000))
    await child.start()
    os.kill((await meetings.next()).pid, signal.SIGKILL)
    await room.told.get()
    async with asyncio.timeout(10):
        await child.stop()


async def test_ctrl_c_in_the_terminal_does_not_reach_a_child_directly(room, meetings, stand_in):
    await room.child(stand_in(READY)).start()
    met = await meetings.next()
    assert os.getsid(met.pid) == met.pid


async def test_children_end_when_their_supervisor_is_killed(meetings, stand_in, tmp_path):
    driver = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from sllm.cli.local.notifications import Notifications\n"
        "from sllm.cli.local.supervisor import Backoff, Child, Program\n"
        "async def main():\n"
        f"    program = Program(name='it', argv={stand_in(READY)!r}, log=Path({str(tmp_path / 'log')!r}))\n"
        "    await Child(program, Notifications(), print, Backoff()).start()\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())"
    )
    supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", driver)
    met = await meetings.next()
    supervisor.kill()
    await supervisor.wait()
    async with asyncio.timeout(10):
        await met.ends()


async def test_only_the_process_itself_can_say_that_it_is_ready(room, monkeypatch):
    from sllm.lifecycle import notify

    monkeypatch.setenv("NOTIFY_SOCKET", room.notifications.address)
    heard: asyncio.Queue[tuple[str, dict[str, str]]] = asyncio.Queue()
    room.notifications.listen(os.getpid() + 1, lambda fields: heard.put_nowait(("other", fields)))
    room.notifications.listen(os.getpid(), lambda fields: heard.put_nowait(("self", fields)))
    notify(READY="1")
    assert await heard.get() == ("self", {"READY": "1"})
    assert heard.empty()


def test_lines_that_are_no_fields_are_left_out():
    assert parse(b"READY=1\nnonsense\nX_A=b=c\n\xff=1") == {"READY": "1", "X_A": "b=c", "�": "1"}


def test_backoff_doubles_up_to_its_most():
    backoff = Backoff(first_s=0.5, most_s=10)
    assert [backoff.delay_s(deaths) for deaths in (1, 2, 3, 6, 10_000)] == [0.5, 1.0, 2.0, 10.0, 10.0]
