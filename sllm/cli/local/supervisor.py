"""Keeps one child process running: start, wait until it is ready, start again when it dies, stop in bounded time."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sllm.cli.local.notifications import Notifications
from sllm.cli.private_files import make_private_dir
from sllm.errors import DeadlineExceeded, OperationFailed
from sllm.tether import tethered

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Wait before a restart: doubles with each death in a row, anew after a life of `steady_s`."""

    first_s: float = 0.5
    most_s: float = 10.0
    steady_s: float = 30.0

    def delay_s(self, deaths: int) -> float:
        return min(self.first_s * 2.0 ** min(deaths - 1, 30), self.most_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run. Its output goes to `log`; `start_s` bounds its first start, `stop_s` its end after SIGTERM."""

    name: str
    argv: tuple[str, ...]
    log: Path
    start_s: float = 300.0
    stop_s: float = 30.0


class Child:
    """A program kept running from `start` to `stop`."""

    def __init__(self, program: Program, notifications: Notifications, say: Say, backoff: Backoff) -> None:
        self.program = program
        self._notifications = notifications
        self._say = say
        self._backoff = backoff
        self._stopping = asyncio.Event()
        self._ready: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process that runs now, if one does."""
        return self._process.pid if self._process else None

    async def start(self) -> Mapping[str, str]:
        """Start it and return what it said when it was ready. Raises OperationFailed if it ends before."""
        self._keeper = asyncio.create_task(self._keep())
        try:
            async with asyncio.timeout(self.program.start_s):
                return await asyncio.shield(self._ready)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self.program.name} is not ready after {self.program.start_s:g} s", hint=f"see {self.program.log}"
            ) from None

    async def stop(self) -> None:
        """Ask it to end, and make it end when its time is over."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._keeper is None:
            return
        try:
            async with asyncio.timeout(self.program.stop_s):
                await asyncio.shield(self._keeper)
        except TimeoutError:
            self._say(f"{self.program.name} does not end; killing it")
            self.kill()
            await self._keeper

    def kill(self) -> None:
        """End it now, with its process group."""
        self._stopping.set()
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    async def _keep(self) -> None:
        deaths = 0
        while not self._stopping.is_set():
            began = asyncio.get_running_loop().time()
            log_start = self.program.log.stat().st_size if self.program.log.exists() else 0
            end = await self._run_once()
            if self._stopping.is_set():
                break
            if not self._ready.done():
                self._fail(_start_failure(self.program, end, log_start))
                return
            steady = asyncio.get_running_loop().time() - began >= self._backoff.steady_s
            deaths = 1 if steady else deaths + 1
            await self._pause(end, self._backoff.delay_s(deaths))
        self._ready.cancel()

    def _fail(self, error: OperationFailed) -> None:
        self._ready.set_exception(error)
        self._ready.exception()  # nobody asks for it if another child failed first, and that is no defect

    async def _pause(self, end: str, delay_s: float) -> None:
        self._say(f"{self.program.name} {end}; starting it again in {delay_s:g} s")
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()

    async def _run_once(self) -> str:
        """Run it from its start to its end, and say how it ended."""
        try:
            process = self._spawn()
        except OSError as error:
            return f"could not be started: {error.strerror}"
        self._process = process
        self._notifications.listen(process.pid, self._heard)
        try:
            return ending(await _ended(process))
        finally:
            self._notifications.forget(process.pid)
            self._process = None

    def _spawn(self) -> subprocess.Popen[bytes]:
        make_private_dir(self.program.log.parent)
        with self.program.log.open("ab") as log:
            return subprocess.Popen(
                tethered(self.program.argv, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": self._notifications.address},
                # Ctrl-C in the terminal must reach only us: children are stopped one after the other.
                start_new_session=True,
            )

    def _heard(self, fields: Mapping[str, str]) -> None:
        if fields.get("READY") != "1":
            return
        if self._ready.done():
            self._say(f"{self.program.name} is ready again")
        else:
            self._ready.set_result(fields)


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process without a thread; returns as Popen does, minus the signal's number if it was killed."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
        return process.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def ending(code: int) -> str:
    """Say how a process ended."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _start_failure(program: Program, end: str, log_start: int) -> OperationFailed:
    written = program.log.read_bytes()[log_start:] if program.log.exists() else b""
    lines = written.decode(errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
    why = said[-1] if said else end
    return OperationFailed(f"{program.name} did not start: {why}", hint=hints[-1] if hints else f"see {program.log}")
