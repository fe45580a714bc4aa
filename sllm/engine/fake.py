"""A language model that does not look at its weights: seeded, deterministic, on a clock. For tests of everything around
an engine. It waits for its weights, though, as any engine does.

The token at output position p is a hash of (prompt, seed, output before p), so a resumed request goes on exactly as it
would have, and one that is resumed with a wrong token does not.
It understands these of vLLM's sampling parameters: max_tokens, min_tokens, seed, stop_token_ids, ignore_eos, logprobs,
prompt_logprobs, and the end token that a front end put in; it ignores the rest.

Environment of the warm process (all optional):
    SLLM_FAKE_TOKEN_S      seconds per step (default 0)
    SLLM_FAKE_PREFILL_S    seconds more per token that a step computes and that is not in the prefix cache (default 0)
    SLLM_FAKE_LOAD_S       seconds to build (default 0)
    SLLM_FAKE_VOCAB        number of tokens where config.json does not tell (default 256)
    SLLM_FAKE_BUILD_ERROR  building fails with this text
    SLLM_FAKE_CRASH_AT     the engine breaks in the step that would make this output position
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sllm.core.launch import Launch
from sllm.core.tokens import Finish, FinishReason, Logprobs, Prefill, TokenRequest
from sllm.engine.base import EngineCore, EngineKind, Hooks, Output
from sllm.engine.fake_cache import FAKE_BLOCK_SIZE, PrefixCache
from sllm.engine.weights import Weights
from sllm.errors import EngineFailed, InvalidArgument
from sllm.version import VERSION

_FIRST_TOKEN = 3  # below are the special tokens that most tokenizers have


class Clock(Protocol):
    def sleep(self, seconds: float) -> None: ...


class _RealClock:
    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSettings:
    token_s: float = 0.0
    prefill_s: float = 0.0
    load_s: float = 0.0
    vocab_size: int = 256
    build_error: str = ""
    crash_at: int | None = None

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> FakeSettings:
        crash_at = env.get("SLLM_FAKE_CRASH_AT")
        return cls(
            token_s=float(env.get("SLLM_FAKE_TOKEN_S", "0")),
            prefill_s=float(env.get("SLLM_FAKE_PREFILL_S", "0")),
            load_s=float(env.get("SLLM_FAKE_LOAD_S", "0")),
            vocab_size=int(env.get("SLLM_FAKE_VOCAB", "256")),
            build_error=env.get("SLLM_FAKE_BUILD_ERROR", ""),
            crash_at=None if crash_at is None else int(crash_at),
        )


def warm() -> EngineKind:
    """Return the kind, configured from the environment."""
    settings = FakeSettings.from_environment(os.environ)

    def build(launch: Launch, weights: Weights, hooks: Hooks) -> EngineCore:
        weights.wait_all()
        weights.release()
        return build_fake(launch, hooks, settings, _RealClock())

    return EngineKind(name="fake", version=VERSION, architectures=(), build=build)


def build_fake(launch: Launch, hooks: Hooks, settings: FakeSettings, clock: Clock) -> FakeCore:
    """Build it, as slowly as the settings say. Raises EngineFailed if they say so."""
    for done in range(4):
        hooks.progress(done / 4)
        clock.sleep(settings.load_s / 4)
    if settings.build_error:
        raise EngineFailed(settings.build_error)
    return FakeCore(
        settings,
        clock,
        vocab_size=_vocab_size(Path(launch.execution_dir) / "config.json", settings.vocab_size),
        capacity=launch.spec.capacity,
        max_model_len=launch.spec.max_model_len,
    )


def _vocab_size(config: Path, default: int) -> int:
    """Stay inside the checkpoint's vocabulary where it has one: the front end turns our tokens into text."""
    try:
        return int(json.loads(config.read_text(encoding="utf-8")).get("vocab_size", default))
    except (OSError, ValueError):
        return default


@dataclass(frozen=True, slots=True)
class _Params:
    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    end_token_id: int | None
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None


def _params_of(request: TokenRequest, max_model_len: int) -> _Params:
    try:
        values: dict[str, Any] = json.loads(request.sampling_params or b"{}")
    except ValueError as error:
        raise InvalidArgument(f"sampling parameters are not JSON: {error}") from error
    prompt_tokens = len(request.token_ids) - request.num_output_tokens
    room = max_model_len - prompt_tokens
    return _Params(
        max_tokens=min(room, values.get("max_tokens", 16) or room),
        min_tokens=values.get("min_tokens", 0),
        stop_token_ids=frozenset(values.get("stop_token_ids") or ()),
        end_token_id=None if values.get("ignore_eos") else values.get("_eos_token_id"),
        seed=values.get("seed"),
        logprobs=values.get("logprobs"),
        prompt_logprobs=values.get("prompt_logprobs"),
    )


class _Row:
    """A request in the engine. `prefill` is set from when its tokens are computed until it is told."""

    def __init__(self, key: int, request: TokenRequest, params: _Params) -> None:
        self.key = key
        self.params = params
        self.token_ids = request.token_ids
        self.cache_salt = request.cache_salt
        self.prompt = request.token_ids[: len(request.token_ids) - request.num_output_tokens]
        self.position = request.num_output_tokens
        self.resumed = request.num_output_tokens > 0
        self.begun = False
        self.prefill: Prefill | None = None
        self._history = hashlib.blake2b(json.dumps([self.prompt, params.seed]).encode(), digest_size=8)
        for token in request.token_ids[len(self.prompt) :]:
            self.had(token)

    def had(self, token: int) -> None:
        self._history.update(token.to_bytes(4))

    def number(self) -> int:
        """Return a 64-bit number that depends on the request and its output so far alone."""
        return int.from_bytes(self._history.digest())


@dataclass(frozen=True, slots=True)
class _Recompute:
    key: int
    token_ids: list[int]
    cache_salt: str


class FakeCore:
    """At most `capacity` requests advance by one token per step; the others wait in order of arrival. Recomputes are
    done where requests leave room."""

    block_size = FAKE_BLOCK_SIZE

    def __init__(
        self, settings: FakeSettings, clock: Clock, *, vocab_size: int, capacity: int, max_model_len: int
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._vocab_size = vocab_size
        self._capacity = capacity
        self._max_model_len = max_model_len
        self._rows: dict[int, _Row] = {}
        self._recomputes: dict[int, _Recompute] = {}
        self._cache = PrefixCache()

    def add(self, key: int, request: TokenRequest) -> None:
        if not 0 <= request.num_output_tokens < len(request.token_ids):
            raise InvalidArgument("a request needs at least one prompt token")
        self._check_room(request.token_ids)
        self._rows[key] = _Row(key, request, _params_of(request, self._max_model_len))

    def recompute(self, key: int, token_ids: list[int], cache_salt: str) -> None:
        if not token_ids:
            raise InvalidArgument("there is nothing to recompute")
        self._check_room(token_ids)
        self._recomputes[key] = _Recompute(key, token_ids, cache_salt)

    def _check_room(self, token_ids: list[int]) -> None:
        if len(token_ids) >= self._max_model_len:
            raise InvalidArgument(f"{len(token_ids)} tokens leave no room in {self._max_model_len}")

    def abort(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._rows.pop(key, None)
            self._recomputes.pop(key, None)

    @property
    def has_work(self) -> bool:
        return bool(self._rows or self._recomputes)

    def step(self) -> list[Output]:
        rows = list(self._rows.values())[: self._capacity]
        recomputes = list(self._recomputes.values())[: self._capacity - len(rows)]
        prefills = [self._prefill(recompute) for recompute in recomputes]
        for row in rows:
            if not row.begun:
                row.begun, row.prefill = True, self._prefill(row)
                prefills.append(row.prefill)
        computed = sum(prefill.num_prompt_tokens - prefill.num_cached_tokens for prefill in prefills)
        self._clock.sleep(self._settings.token_s + computed * self._settings.prefill_s)
        outputs = [self._advance(row) for row in rows]
        finish = Finish(reason=FinishReason.LENGTH)
        for recompute, prefill in zip(recomputes, prefills, strict=False):
            outputs.append(Output(key=recompute.key, token_ids=[], finish=finish, prefill=prefill))
        self.abort([output.key for output in outputs if output.finish])
        return outputs

    def close(self) -> None:
        self.abort([*self._rows, *self._recomputes])

    def _prefill(self, work: _Row | _Recompute) -> Prefill:
        cached = self._cache.compute(work.token_ids, work.cache_salt)
        return Prefill(num_prompt_tokens=len(work.token_ids), num_cached_tokens=cached)

    def _advance(self, row: _Row) -> Output:
        if row.resumed and (ended := _finish(row.params, row.token_ids[-1], row.position)):
            return Output(key=row.key, token_ids=[], finish=ended)
        if row.position == self._settings.crash_at:
            raise RuntimeError(f"told to break at position {row.position}")
        token = self._token(row)
        output = Output(key=row.key, token_ids=[token], logprobs=self._logprobs(row, [token], row.params.logprobs))
        if not row.resumed and row.prefill is not None:
            output.prefill = row.prefill
            output.prompt_logprobs = self._logprobs(row, row.prompt[1:], row.params.prompt_logprobs)
        row.prefill = None
        row.had(token)
        row.position += 1
        output.finish = _finish(row.params, token, row.position)
        return output

    def _token(self, row: _Row) -> int:
        return _FIRST_TOKEN + row.number() % max(1, self._vocab_size - _FIRST_TOKEN)

    def _logprobs(self, row: _Row, tokens: list[int], count: int | None) -> Logprobs | None:
        if count is None:
            return None
        candidates = [[token, *((token + i) % self._vocab_size for i in range(1, count + 1))] for token in tokens]
        return Logprobs(
            num_rows=len(tokens),
            width=count + 1,
            token_ids=[token for line in candidates for token in line],
            values=[-(i + 1) / 8 for _ in tokens for i in range(count + 1)],  # exact in float32
            ranks=[1] * len(tokens),
        )


def _finish(params: _Params, token: int, num_output_tokens: int) -> Finish | None:
    if num_output_tokens > params.min_tokens:
        if token == params.end_token_id:
            return Finish(reason=FinishReason.STOP)
        if token in params.stop_token_ids:
            return Finish(reason=FinishReason.STOP, stop_token_id=token)
    if num_output_tokens >= params.max_tokens:
        return Finish(reason=FinishReason.LENGTH)
    return None
