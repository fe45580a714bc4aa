"""The warm process itself: spawned, spoken to over a socket pair (sllm.core.launch has the protocol), respawned.

It ends with the agent, by its parent-death signal and by the end of the socket; the hosts that it forked do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sllm.agent.children import Children
from sllm.agent.logs import tail_lines
from sllm.agent.supervision import Awaited, child_environment, keep_attempting, output_to
from sllm.agent.warm.base import HostFds, HostProcess
from sllm.agent.warm.channel import Channel
from sllm.agent.warm.host import ForkedHost
from sllm.core.launch import Launch, WarmReady
from sllm.errors import EngineFailed, InvalidConfiguration, SllmError
from sllm.tether import tethered

log = logging.getLogger(__name__)

BACKOFF_S = (0.5, 30.0)  # first and longest wait before it is spawned again
_CLOSE_S = 5.0
_UNWANTED_S = 10.0  # for a fork that was called off to be answered, and its host to die


def command(engine: str, fd: int) -> tuple[str, ...]:
    """Return how the warm process of an engine is run."""
    return (sys.executable, "-P", "-m", "sllm.engine.warm", "--fd", str(fd), "--engine", engine)


class WarmProcess:
    """Keeps one warm process alive. `on_change` is called when it becomes able to fork, and when it no longer is."""

    def __init__(
        self,
        make_command: Callable[[int], Sequence[str]],
        log_path: Path,
        scratch: Path,
        children: Children,
        on_change: Callable[[], None],
    ) -> None:
        self._make_command = make_command
        self._log_path = log_path
        self._scratch = scratch
        self._children = children
        self._on_change = on_change
        self._channel: Awaited[Channel] = Awaited()
        self._about: WarmReady | None = None
        self._supervisor = asyncio.create_task(keep_attempting(self._attempt, BACKOFF_S), name="warm process")

    @property
    def about(self) -> WarmReady | None:
        return self._about

    async def ready(self) -> WarmReady:
        await self._channel.get()
        return self._about or await self.ready()

    async def fork(self, launch: Launch, fds: HostFds) -> HostProcess:
        channel = await self._channel.get()
        with self._children.coming():
            answer = channel.fork(launch, fds)
            try:
                pid = await asyncio.shield(answer)
            except asyncio.CancelledError:
                await self._end_unwanted(answer)
                raise
            host = self._open(pid)
        if host is None:
            raise EngineFailed("the engine host died as it was forked", hint="see the replica's log")
        return host

    async def close(self) -> None:
        self._supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervisor
        self._channel.cancel()

    async def _attempt(self) -> bool:
        """As `_run_once`; what nobody expected, such as no memory for a process, passes like any other failure."""
        try:
            return await self._run_once()
        except Exception as error:
            log.exception("running the warm process failed")
            self._give_up(EngineFailed(f"the warm process cannot be run: {type(error).__name__}: {error}"))
            return False

    async def _run_once(self) -> bool:
        """Run one warm process to its end; return whether it ever was ready."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with contextlib.closing(ours):
            with contextlib.closing(theirs), self._children.coming():
                process = await self._spawn(theirs.fileno())
                self._children.own(process.pid)
            channel = Channel(ours)
            try:
                return await self._speak(channel, process)
            finally:
                channel.close()
                ours.close()  # which tells it to end
                await _end(process)
                self._children.disown(process.pid)

    async def _speak(self, channel: Channel, process: asyncio.subprocess.Process) -> bool:
        try:
            about = await channel.ready()
        except InvalidConfiguration as error:
            await process.wait()
            self._give_up(error)
            return False
        except EngineFailed:
            self._give_up(self._why(await process.wait()))
            return False
        self._about = about
        self._channel.has_come(channel)
        log.info("warm process %d is ready: %s %s, %.1f s", process.pid, about.engine, about.version, about.seconds)
        try:
            self._on_change()
            await channel.closed()
            log.error("the warm process ended: %s", self._why(await process.wait()).message)
        finally:
            self._about = None
            self._channel.has_gone()
            self._on_change()
        return True

    async def _spawn(self, fd: int) -> asyncio.subprocess.Process:
        with output_to(self._log_path) as output:
            return await asyncio.create_subprocess_exec(
                *tethered(self._make_command(fd), signal.SIGTERM),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(fd,),
                env=child_environment(self._scratch),
                start_new_session=True,  # a terminal's Ctrl-C is for the agent
            )

    def _open(self, pid: int) -> ForkedHost | None:
        host = ForkedHost.open(pid, on_end=lambda: self._children.disown(pid))
        if host is not None:
            self._children.own(pid)
        return host

    async def _end_unwanted(self, answer: asyncio.Future[int]) -> None:
        """End a host whose start was called off while it was being forked, and return when it is gone."""
        try:
            async with asyncio.timeout(_UNWANTED_S):
                if host := self._open(await asyncio.shield(answer)):
                    host.signal(signal.SIGKILL)
                    await host.ended()
        except SllmError:
            return  # there is none
        except TimeoutError:
            log.error("a fork that was called off has not been answered, or its host does not die")
        finally:
            if not answer.done():  # called off again: it ends when it comes
                answer.add_done_callback(self._kill_late)

    def _kill_late(self, answer: asyncio.Future[int]) -> None:
        if answer.exception() is None and (host := self._open(answer.result())):
            host.signal(signal.SIGKILL)  # it reaps itself

    def _give_up(self, error: SllmError) -> None:
        log.error("%s", error.message)
        self._channel.fail(error)

    def _why(self, code: int) -> EngineFailed:
        last = " | ".join(line.strip() for line in tail_lines(self._log_path, 3) if line.strip())
        return EngineFailed(
            f"the warm process ended with code {code}: {last}", hint=f"see {self._log_path} on the node"
        )


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()  # it may be importing for a long time yet, without a look at its socket
    try:
        async with asyncio.timeout(_CLOSE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
