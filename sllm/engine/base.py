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
        """Take a request in; one that has had output goes on as if it had always been here. What needs no further
        token (its last one ends it) finishes at once, with none.

        Raises SllmError if it can never be served; the engine is unharmed then.
        """

    def recompute(self, key: int, token_ids: list[int], cache_salt: str) -> None:
        """Have the KV cache of tokens computed, so that who brings them soon finds all full blocks of it (paper §5: a
        round of a migration, at its destination). No token comes of it: its one output has a finish (LENGTH) and
        `prefill`, which says how many of the tokens were cached. `abort` cancels it. Requests go first.

        Raises SllmError if it can never be done.
        """

    @property
    def block_size(self) -> int:
        """Tokens in a block of the prefix cache: those in a partly filled one are computed again by whoever resumes."""

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
