"""What an engine is to its host: tokens in, one step at a time, tokens out.

All methods of an `EngineCore` are called in one thread, the engine thread; only the `Hooks` may be called from another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sllm.core.launch import Launch
from sllm.core.tokens import Finish, Logprobs, Prefill, TokenRequest
from sllm.engine.weights import Weights


@dataclass(slots=True, kw_only=True)
class Output:
    """What one step made for one request. `key` is the host's name for it. Not frozen: made for every token."""

    key: int
    token_ids: list[int]
    finish: Finish | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    prefill: Prefill | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """An engine's way to its host, from any thread: `wake` when `has_work` became true by itself; `progress` with the
    done share (0..1) of its build; `arrived` with the share of its weights that is there; `saved` when its parameters
    are at `Launch.save_runtime`."""

    wake: Callable[[], None]
    progress: Callable[[float], None]
    arrived: Callable[[float], None]
    saved: Callable[[], None]


class EngineCore(Protocol):
    def add(self, key: int, request: TokenRequest) -> None:
        """Take a request in. Raises SllmError if it can never be served; the engine is unharmed then."""

    def abort(self, keys: Sequence[int]) -> None:
        """Forget requests; unknown keys are ignored. No output follows."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""

    def step(self) -> list[Output]:
        """Do one step. Any exception means that the engine is broken for good."""

    def close(self) -> None:
        """Give everything back. Nothing is called afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """An engine whose code is imported and ready to be built. `architectures` empty: it takes any."""

    name: str
    version: str
    architectures: tuple[str, ...]
    build: Callable[[Launch, Weights, Hooks], EngineCore]
