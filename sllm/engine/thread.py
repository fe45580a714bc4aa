"""The engine thread: builds an engine, feeds it commands, steps it while it has work, blocks while it has none.

It decides nothing: what it sees it tells its listener, in the event loop, in order.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sllm.core.tokens import Finish, FinishReason, TokenRequest
from sllm.engine.base import EngineCore, Hooks, Output
from sllm.errors import EngineFailed, SllmError

log = logging.getLogger(__name__)

# A finer progress would wake the event loop for every tensor.
_PROGRESS_STEP = 0.05


class Listener(Protocol):
    """Whom the engine thread tells. All methods run in the event loop."""

    def built(self) -> None: ...
    def failed(self, error: SllmError) -> None: ...
    def progressed(self, share: float) -> None: ...
    def arrived(self, share: float) -> None: ...
    def saved(self) -> None: ...
    def stepped(self, outputs: list[Output]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Add:
    key: int
    request: TokenRequest


@dataclass(frozen=True, slots=True)
class _Recompute:
    key: int
    token_ids: list[int]
    cache_salt: str


@dataclass(frozen=True, slots=True)
class _Abort:
    keys: list[int]


@dataclass(frozen=True, slots=True)
class _Wake:
    pass


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Add | _Recompute | _Abort | _Wake | _Stop


class EngineThread:
    """Start it in a running event loop. `add`, `recompute`, `abort` and `stop` only leave a command and never block.

    `steps` counts the steps that have ended; `working` is False while the thread waits for commands; `block_size` is
    the engine's once it is built.
    """

    def __init__(self, build: Callable[[Hooks], EngineCore], listener: Listener) -> None:
        self._build = build
        self._listener = listener
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self.steps = 0
        self.working = False
        self.block_size = 1
        # A daemon: a build cannot be interrupted, and must not keep a process that is told to end.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, key: int, request: TokenRequest) -> None:
        self._inbox.put(_Add(key, request))

    def recompute(self, key: int, token_ids: list[int], cache_salt: str) -> None:
        self._inbox.put(_Recompute(key, token_ids, cache_salt))

    def abort(self, keys: list[int]) -> None:
        self._inbox.put(_Abort(keys))

    def stop(self) -> None:
        self._inbox.put(_Stop())

    def _run(self) -> None:
        core: EngineCore | None = None
        try:
            core = self._build(self._hooks())
            self.block_size = core.block_size
            self._tell(self._listener.built)
            self._serve(core)
        except Exception as error:
            log.exception("the engine failed")
            self._tell(self._listener.failed, _engine_error(error))
        finally:
            self.working = False
            if core is not None:
                _close(core)
            self._tell(self.ended.set)

    def _hooks(self) -> Hooks:
        return Hooks(
            wake=lambda: self._inbox.put(_Wake()),
            progress=self._in_steps(self._listener.progressed),
            arrived=self._in_steps(self._listener.arrived),
            saved=lambda: self._tell(self._listener.saved),
        )

    def _serve(self, core: EngineCore) -> None:
        while self._obey(core):
            outputs = core.step()
            self.steps += 1
            if outputs:
                self._tell(self._listener.stepped, outputs)

    def _obey(self, core: EngineCore) -> bool:
        """Carry out the commands that wait, and wait for more while the engine has no work. False: stop."""
        while True:
            self.working = core.has_work
            try:
                command = self._inbox.get(block=not self.working)
            except queue.Empty:
                return True
            self.working = True
            match command:
                case _Add(key, request):
                    self._enter(key, lambda: core.add(key, request))
                case _Recompute(key, token_ids, cache_salt):
                    self._enter(key, lambda: core.recompute(key, token_ids, cache_salt))
                case _Abort():
                    core.abort(command.keys)
                case _Stop():
                    return False

    def _enter(self, key: int, enter: Callable[[], None]) -> None:
        """Let the engine take something in; if it refuses that, say so as its only output."""
        try:
            enter()
        except SllmError as error:
            finish = Finish(reason=FinishReason.ERROR, error=error)
            self._tell(self._listener.stepped, [Output(key=key, token_ids=[], finish=finish)])

    def _in_steps(self, listener: Callable[[float], None]) -> Callable[[float], None]:
        """Return a function that tells a share only when it has grown by a step, or is all."""
        told = 0.0

        def tell(share: float) -> None:
            nonlocal told
            if share >= told + _PROGRESS_STEP or share >= 1.0 > told:
                told = share
                self._tell(listener, share)

        return tell

    def _tell(self, function: Callable[..., object], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: the process is ending, and nobody listens any more
            log.debug("the event loop is gone")


def _engine_error(error: Exception) -> SllmError:
    if isinstance(error, SllmError):
        return error
    text = " ".join(str(error).split()) or type(error).__name__
    return EngineFailed(f"the engine failed: {text}", hint="see the replica's log: `sllm logs REPLICA`")


def _close(core: EngineCore) -> None:
    try:
        core.close()
    except Exception:
        log.exception("closing the engine failed")
