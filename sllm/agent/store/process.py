"""Keeps one store process alive: finds the one that an agent before left, or spawns one; and again when it dies.

The agent holds the pool's descriptor and the last table: a new process takes the memory over with its content, which
it verifies before it counts. The listening socket is made here and inherited, so that connecting never races with the
process' start; it has a name (STATE/run/store.sock) for the next agent only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sllm.agent.children import Children
from sllm.agent.logs import tail_lines
from sllm.agent.store import protocol
from sllm.agent.store.channel import memfd_with
from sllm.agent.store.client import Died, Listener, StoreClient
from sllm.agent.supervision import Awaited, child_environment, keep_attempting, output_to
from sllm.agent.warm.host import ForkedHost
from sllm.errors import Unavailable
from sllm.linux import start_ticks
from sllm.loader.memory.table import Entry

log = logging.getLogger(__name__)

BACKOFF_S = (0.1, 30.0)  # first and longest wait before it is spawned again
_FIND_S = 2.0
_CLOSE_S = 5.0
_SOCKET = "store.sock"
_PID = "store.pid"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """`size_bytes` is the pool's; with `any_size` one that is found may have another. A process that takes longer than
    `welcome_s` to greet, or later than `silent_s` to answer the ping of every `ping_s`, is ended. `environment` is
    added to it."""

    size_bytes: int
    any_size: bool
    hugepages: bool
    prefault: bool
    lock: bool
    threads: int
    grace_s: float
    welcome_s: float = 20.0
    ping_s: float = 3.0
    silent_s: float = 10.0
    environment: dict[str, str] = field(default_factory=dict)

    def arguments(self) -> tuple[str, ...]:
        values = {"size-bytes": self.size_bytes, "threads": self.threads, "grace-s": self.grace_s}
        flags = {"hugepages": self.hugepages, "prefault": self.prefault, "lock": self.lock}
        given = tuple(f"--{name}={value}" for name, value in values.items())
        return (*given, *(f"--{name}" for name, wanted in flags.items() if wanted))


class StoreProcess:
    """`folder` is the agent's `run` folder, for its socket; `scratch` for temporary files of what it imports."""

    def __init__(self, options: StoreOptions, folder: Path, log_path: Path, scratch: Path, children: Children) -> None:
        self._options = options
        self._folder = folder
        self._log_path = log_path
        self._scratch = scratch
        self._children = children
        self._listener: Listener | None = None
        self._client: Awaited[StoreClient] | None = None
        self._last: StoreClient | None = None  # its pool and table are what the next process takes over
        self._process: ForkedHost | None = None
        self._size_bytes = options.size_bytes
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._last.entries.values()) if self._last else ()

    @property
    def kept_back_bytes(self) -> int:
        return self._last.kept_back_bytes if self._last else 0

    @property
    def is_there(self) -> bool:
        return self._client is not None and self._client.is_there

    def start(self, listener: Listener) -> None:
        self._listener = listener
        self._client = Awaited()
        self._supervisor = asyncio.create_task(keep_attempting(self._attempt, BACKOFF_S), name="store process")

    async def client(self) -> StoreClient:
        assert self._client is not None
        if self._last is not None and self._last.is_closed:
            self._client.has_gone()  # which is known here before the supervisor has seen to it
        return await self._client.get()

    async def close(self, *, stop: bool) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if self._client is not None:
            self._client.cancel()
        if stop:
            await self._end(self._last, keep=False)
        if self._last is not None:
            self._last.close()
            self._last = None
        if self._process is not None:
            self._process.close()
            self._process = None

    async def _attempt(self) -> bool:
        """As `_run_once`; what nobody expected passes like any other failure."""
        try:
            return await self._run_once()
        except Exception as error:
            log.exception("looking after the store process failed by a defect of the agent")
            self._give_up(f"cannot be looked after: {type(error).__name__}: {error}")
            return False

    async def _run_once(self) -> bool:
        """Stay with one process to its end; return whether it ever was ready."""
        assert self._listener is not None
        try:
            client = StoreClient(self._reach(), self._listener)
        except OSError as error:
            self._give_up(f"cannot be started: {error.strerror}")
            return False
        welcome = await self._welcomed(client)
        if welcome is None:
            self._give_up("does not answer")
            await self._kill()
            return False
        self._keep(client, welcome.pid)
        if not self._suits(welcome):
            log.warning("the store process found is of another version or size: it is replaced")
            await self._end(client, keep=self._can_be_inherited(client))
            return True
        await self._serve(client, welcome)
        return True

    async def _welcomed(self, client: StoreClient) -> protocol.Welcome | None:
        """Return None, and close the connection, if the process does not answer."""
        try:
            async with asyncio.timeout(self._options.welcome_s):
                return await client.welcome()
        except (Died, TimeoutError):
            client.close()
            return None
        except BaseException:
            client.close()
            raise

    def _keep(self, client: StoreClient, pid: int) -> None:
        if self._last is not None:
            self._last.close()
        self._last = client
        if self._process is None:  # an agent before this one spawned it
            self._process = ForkedHost.open(pid)

    def _give_up(self, how: str) -> None:
        assert self._client is not None
        last = " | ".join(line.strip() for line in tail_lines(self._log_path, 1))
        error = Unavailable(f"the store process {how}: {last}", hint=f"see {self._log_path} on the node")
        log.error("%s", error.message)
        self._client.fail(error)

    def _suits(self, welcome: protocol.Welcome) -> bool:
        same_size = self._options.any_size or welcome.size_bytes == self._options.size_bytes
        return welcome.release == protocol.RELEASE and same_size

    async def _serve(self, client: StoreClient, welcome: protocol.Welcome) -> None:
        assert self._client is not None
        self._size_bytes = welcome.size_bytes
        pages = "huge pages" if welcome.huge else "4 KiB pages"
        log.info("store process %d is ready: a pool of %d bytes of %s", welcome.pid, welcome.size_bytes, pages)
        self._client.has_come(client)
        self._changed()
        try:
            await self._attend(client)
            log.error("the store process ended; what it had in memory is verified by the next one")
            await self._reaped()
        finally:
            self._client.has_gone()
            self._changed()

    async def _attend(self, client: StoreClient) -> None:
        """Return when the process is gone, which one that no longer answers is made to be."""
        closed = asyncio.create_task(client.closed())
        try:
            while not closed.done():
                pong = client.ping()
                # Not a timeout: when this process was stopped itself, an answer that has come counts.
                await asyncio.wait({closed, pong}, timeout=self._options.silent_s, return_when=asyncio.FIRST_COMPLETED)
                if not pong.done() and not closed.done():
                    log.error("the store process has not answered for %g s: it is ended", self._options.silent_s)
                    await self._kill()
                await asyncio.wait({closed}, timeout=self._options.ping_s)
        finally:
            closed.cancel()

    async def _reaped(self) -> None:
        """Wait until a process is gone whose connection has ended; one that lives on is connected to again."""
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._process.ended()
                self._process = None

    def _changed(self) -> None:
        if self._listener is not None:
            self._listener.changed()

    def _reach(self) -> socket.socket:
        """Connect to the living process, or to one that is being spawned. Raises OSError."""
        with _address(self._folder) as address:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return _connected(address)
            (self._folder / _SOCKET).unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(address)
                os.chmod(self._folder / _SOCKET, 0o600)
                listener.listen()
                self._spawn(listener.fileno())
                return _connected(address)

    def _spawn(self, listen_fd: int) -> None:
        adopted = self._inheritance()
        arguments = (f"--listen-fd={listen_fd}", *self._options.arguments())
        if adopted:
            arguments = (*arguments, "--adopt", *map(str, adopted))
        try:
            self._run(arguments, (listen_fd, *adopted))
        finally:
            for fd in adopted[1:]:
                os.close(fd)

    def _inheritance(self) -> tuple[int, ...]:
        """Return the descriptors of pool and table that the next process is to take over, if there are any."""
        last = self._last
        if last is None or not self._can_be_inherited(last):
            return ()
        return last.pool_fd, memfd_with("sllm-table", protocol.table_bytes(last.entries.values()))

    def _can_be_inherited(self, client: StoreClient) -> bool:
        return client.pool_fd >= 0 and os.fstat(client.pool_fd).st_size == self._wanted_size()

    def _wanted_size(self) -> int:
        return self._size_bytes if self._options.any_size else self._options.size_bytes

    def _run(self, arguments: Sequence[str], fds: Sequence[int]) -> None:
        with output_to(self._log_path) as output, self._children.coming():
            process = subprocess.Popen(
                (sys.executable, "-P", "-m", "sllm.agent.store.main", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=fds,
                env=child_environment(self._scratch) | self._options.environment,
                start_new_session=True,  # it outlives the agent, and a terminal's Ctrl-C is not for it
            )
            self._watch(process.pid)
            process.returncode = 0  # it is reaped by pidfd; Popen must not try

    def _watch(self, pid: int) -> None:
        if self._process is not None:
            self._process.close()
        self._children.own(pid)
        self._process = ForkedHost.open(pid, on_end=lambda: self._children.disown(pid))
        (self._folder / _PID).write_text(f"{pid} {start_ticks(pid) or 0}", encoding="ascii")

    async def _end(self, client: StoreClient | None, *, keep: bool) -> None:
        """End the process, whoever spawned it: by its connection, if it has one. `keep`: its pool is taken over."""
        if client is not None and not client.is_closed:
            client.quit(keep=keep)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await client.closed()
                    if self._process is not None:
                        await self._process.ended()
        await self._kill()
        (self._folder / _SOCKET).unlink(missing_ok=True)

    async def _kill(self) -> None:
        """Return when no process is left."""
        process = self._process or self._spawned_before()
        if process is not None:
            process.signal(signal.SIGKILL)
            await process.ended()
            self._process = None

    def _spawned_before(self) -> ForkedHost | None:
        """Return the process that an agent before this one spawned, if it lives."""
        try:
            pid, ticks = (self._folder / _PID).read_text(encoding="ascii").split()
            return ForkedHost.open(int(pid), int(ticks))
        except (OSError, ValueError):
            return None


async def present_bytes(folder: Path) -> int:
    """Return how much memory the pool of a store process that runs already has filled; 0 without one."""
    try:
        with _address(folder) as address:
            client = StoreClient(_connected(address), _Deaf())
    except OSError:
        return 0
    try:
        async with asyncio.timeout(_FIND_S):
            await client.welcome()
            return os.fstat(client.pool_fd).st_blocks * 512
    except (Died, TimeoutError):
        return 0
    finally:
        client.close()


class _Deaf:
    """Listens to nothing."""

    def changed(self) -> None: ...
    def loaded(self, loaded: protocol.Loaded) -> None: ...
    def damaged(self, damaged: protocol.Damaged) -> None: ...


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    """Give the socket an address for a moment: one has room for 107 bytes only, and state folders can lie deeper."""
    folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder_fd}/{_SOCKET}"
    finally:
        os.close(folder_fd)


def _connected(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock
