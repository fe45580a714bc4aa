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
class _Abort:
    keys: list[int]


@dataclass(frozen=True, slots=True)
class _Wake:
    pass


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class EngineThread:
    """Start it in a running event loop. `add`, `abort` and `stop` only leave a command and never block."""

    def __init__(self, build: Callable[[Hooks], EngineCore], listener: Listener) -> None:
        self._build = build
        self._listener = listener
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Wake | _Stop] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        # A daemon: a build cannot be interrupted, and must not keep a process that is told to end.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, key: int, request: TokenRequest) -> None:
        self._inbox.put(_Add(key, request))

    def abort(self, keys: list[int]) -> None:
        self._inbox.put(_Abort(keys))

    def stop(self) -> None:
        self._inbox.put(_Stop())

    def _run(self) -> None:
        core: EngineCore | None = None
        try:
            core = self._build(self._hooks())
            self._tell(self._listener.built)
            self._serve(core)
        except Exception as error:
            log.exception("the engine failed")
            self._tell(self._listener.failed, _engine_error(error))
        finally:
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
            if outputs:
                self._tell(self._listener.stepped, outputs)

    def _obey(self, core: EngineCore) -> bool:
        """Carry out the commands that wait, and wait for more while the engine has no work. False: stop."""
        while True:
            try:
                command = self._inbox.get(block=not core.has_work)
            except queue.Empty:
                return True
            match command:
                case _Add():
                    self._add(core, command)
                case _Abort():
                    core.abort(command.keys)
                case _Stop():
                    return False

    def _add(self, core: EngineCore, command: _Add) -> None:
        try:
            core.add(command.key, command.request)
        except SllmError as error:
            finish = Finish(reason=FinishReason.ERROR, error=error)
            self._tell(self._listener.stepped, [Output(key=command.key, token_ids=[], finish=finish)])

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
