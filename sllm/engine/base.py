"""What an engine is to its host: tokens in, one step at a time, tokens out.

All methods of an `EngineCore` are called in one thread, the engine thread; only the `Hooks` may be called from another.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sllm.core.launch import Launch, TensorEntry
from sllm.core.tokens import Finish, Logprobs, Prefill, TokenRequest


@dataclass(slots=True, kw_only=True)
class Weights:
    """A checkpoint's tensors in shared memory. `memory` is mapped MAP_PRIVATE and writable: what an engine writes there
    stays its own. None where no tensor has bytes, and after `release`."""

    memory: mmap.mmap | None
    tensors: tuple[TensorEntry, ...]

    def release(self) -> None:
        """Let go of the memory: it is unmapped with the last tensor that is a view of it, at once if there is none.

        Not `mmap.close`: torch's views do not stop it, and would point nowhere.
        """
        self.memory = None


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
    done share (0..1) of its build."""

    wake: Callable[[], None]
    progress: Callable[[float], None]


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
