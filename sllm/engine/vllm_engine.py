"""vLLM's EngineCore, in this process and in one thread, as an `EngineCore` of ours.

A request with a grammar is prepared (tokenizer loaded, grammar compiled) in a thread of its own and enters the
scheduler when it is ready: the scheduler would otherwise spin while it waits for the grammar.
"""

from __future__ import annotations

import os
import queue
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.core import EngineCore as VllmEngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.structured_output import StructuredOutputManager

from sllm.core.launch import Launch
from sllm.core.tokens import Finish, FinishReason, TokenRequest
from sllm.engine import vllm_loader, vllm_resume, vllm_runtime
from sllm.engine.base import EngineCore, Hooks, Output
from sllm.engine.vllm_args import engine_config
from sllm.engine.vllm_errors import build_error
from sllm.engine.vllm_recompute import Entrance, Recomputes
from sllm.engine.vllm_tokens import check_for_vocabulary, engine_request, output_of, sampling_params
from sllm.engine.weights import Weights
from sllm.errors import EngineFailed, InvalidArgument, SllmError


def build(launch: Launch, weights: Weights, hooks: Hooks) -> EngineCore:
    """Build vLLM's engine for a launch. Raises the SllmError that says best why it does not come up."""
    torch.set_num_threads(launch.threads)
    config = engine_config(launch)
    vllm_resume.install(config.model_config.get_vocab_size())
    offered = vllm_loader.offer(weights, launch, hooks)
    try:
        core = VllmEngineCore(config, _Executor, log_stats=False)
    except Exception as error:
        raise build_error(error) from error
    finally:
        _rendezvous().unlink(missing_ok=True)
        vllm_loader.withdraw()
        weights.release()  # what the engine uses in place, it keeps
    if offered.kept is not None:
        vllm_runtime.save_in_background(offered.kept, launch, hooks.saved)
    return VllmCore(core, hooks)


class _Executor(UniProcExecutor):
    """Its ranks (of which there is one) meet by a file that can be removed: vLLM's own would stay in a failed build."""

    def _distributed_args(self) -> tuple[str, int, int]:
        _, rank, local_rank = super()._distributed_args()
        return f"file://{_rendezvous()}", rank, local_rank


def _rendezvous() -> Path:
    return Path(tempfile.gettempdir()) / f".vllm-{os.getpid()}"


class VllmCore:
    def __init__(self, core: Any, hooks: Hooks) -> None:
        self._core = core
        self._hooks = hooks
        self._vocab_size: int = core.vllm_config.model_config.get_vocab_size()
        self._max_model_len: int = core.vllm_config.model_config.max_model_len
        self._grammars = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._preparing: dict[int, Future[Any]] = {}
        self._prepared: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._grammars_ready = False
        self._ended: list[Output] = []
        self._recomputes = Recomputes(
            Entrance(prepare=self._prepare_recompute, enter=self._enter),
            block_size=self.block_size,
            whole=core.vllm_config.scheduler_config.enable_chunked_prefill,
        )

    def add(self, key: int, request: TokenRequest) -> None:
        params = sampling_params(request.sampling_params)
        self._check(request.token_ids, request.num_output_tokens)
        self._check_params(request, params)
        theirs = engine_request(key, request, vllm_resume.prompt_of(request), params)
        if params.structured_outputs is None:
            self._enter(self._prepare(theirs))
            return
        future = self._grammars.submit(self._prepare_grammar, theirs)
        self._preparing[key] = future
        future.add_done_callback(lambda _: self._announce(key))

    def recompute(self, key: int, token_ids: list[int], cache_salt: str) -> None:
        self._check(token_ids, num_output_tokens=0)
        self._recomputes.hold(key, token_ids, cache_salt)

    @property
    def block_size(self) -> int:
        return int(self._core.vllm_config.cache_config.block_size)

    def _enter(self, request: Any) -> None:
        ended = vllm_resume.ended(request, self._max_model_len)
        if ended is not None:
            self._ended.append(ended)
            return
        try:
            self._core.add_request(request)
        except Exception as error:
            raise EngineFailed(f"the engine did not take the request: {error}") from error

    def _check(self, token_ids: list[int], num_output_tokens: int) -> None:
        """Refuse what would break the engine for everybody. The front end has checked more, but it may be another
        version, or another model's."""
        if not 0 <= num_output_tokens < len(token_ids):
            raise InvalidArgument("a request needs at least one prompt token")
        if len(token_ids) - num_output_tokens >= self._max_model_len or len(token_ids) > self._max_model_len:
            raise InvalidArgument(f"{len(token_ids)} tokens leave no room in a context of {self._max_model_len}")
        if max(token_ids) >= self._vocab_size:
            raise InvalidArgument(f"token {max(token_ids)} is not in the vocabulary of {self._vocab_size}")

    def _check_params(self, request: TokenRequest, params: Any) -> None:
        """As `_check`; fill in what depends on the engine, and leave out what was answered before it came here."""
        if params.n != 1:
            raise InvalidArgument("each choice must be a request of its own")
        if params.max_tokens is None:
            params.max_tokens = self._max_model_len - len(request.token_ids) + request.num_output_tokens
        if request.num_output_tokens and params.prompt_logprobs is not None:
            params.prompt_logprobs = None
            params.skip_reading_prefix_cache = False  # it was not to be read for their sake
        check_for_vocabulary(params, self._vocab_size)
        try:
            params.verify(self._core.vllm_config.model_config, None, None, None)
        except (ValueError, VLLMClientError) as error:
            raise InvalidArgument(f"sampling parameters: {error}") from error

    def _prepare(self, theirs: Any) -> Any:
        """Return vLLM's Request, all output that it has had in it."""
        request, _ = self._core.preprocess_add_request(theirs)
        grammar = request.structured_output_request and request.structured_output_request.grammar
        if isinstance(grammar, Exception):
            raise grammar
        vllm_resume.replay(request, self._core.structured_output_manager)
        return request

    def _prepare_grammar(self, theirs: Any) -> Any:
        """In the grammar thread: as `_prepare`, its grammar compiled."""
        if not self._grammars_ready:
            self._make_grammar_manager()
            self._grammars_ready = True
        return self._prepare(theirs)

    def _make_grammar_manager(self) -> None:
        """Replace the manager, which was made without a tokenizer, by one that has it."""
        self._core.vllm_config.model_config.skip_tokenizer_init = False
        manager = StructuredOutputManager(self._core.vllm_config)
        manager._use_async_grammar_compilation = False  # this thread is there to wait for it
        self._core.structured_output_manager = manager
        self._core.scheduler.structured_output_manager = manager

    def _announce(self, key: int) -> None:
        self._prepared.put(key)
        self._hooks.wake()

    def abort(self, keys: Sequence[int]) -> None:
        for key in keys:
            future = self._preparing.pop(key, None)
            if future is not None:
                future.cancel()
        self._ended = [output for output in self._ended if output.key not in keys]
        pieces = self._recomputes.forget(keys)
        self._core.abort_requests([str(key) for key in (*keys, *pieces)])

    @property
    def has_work(self) -> bool:
        core = self._core
        waiting = self._ended or self._recomputes.held or not self._prepared.empty()
        return bool(waiting or core.scheduler.has_requests() or core.batch_queue)

    def step(self) -> list[Output]:
        refused = self._admit()
        if (failed := self._recomputes.enter(self._core.scheduler)) is not None:
            refused.append(failed)
        outputs, self._ended = self._ended + refused, []
        stepped, executed = self._core.step_fn()
        self._core.post_step(executed)
        for client in (stepped or {}).values():
            stripped = (self._recomputes.strip(output_of(output)) for output in client.outputs)
            outputs += [output for output in stripped if output is not None]
        return outputs

    def _prepare_recompute(self, key: int, request: TokenRequest, params: Any) -> Any:
        return self._prepare(engine_request(key, request, request.token_ids, params))

    def _admit(self) -> list[Output]:
        """Let the requests in whose grammar is ready; return an output for each one whose grammar is wrong."""
        refused: list[Output] = []
        while not self._prepared.empty():
            key = self._prepared.get()
            future = self._preparing.pop(key, None)
            if future is None:
                continue  # aborted meanwhile
            try:
                self._enter(_grammar_result(future))
            except SllmError as error:
                finish = Finish(reason=FinishReason.ERROR, error=error)
                refused.append(Output(key=key, token_ids=[], finish=finish))
        return refused

    def close(self) -> None:
        """Stop the grammar thread. vLLM's own shutdown takes a second to give back what the process' end gives back."""
        self._grammars.shutdown(wait=False, cancel_futures=True)


def _grammar_result(future: Future[Any]) -> Any:
    error = future.exception()
    if error is not None:
        raise InvalidArgument(f"the engine refused the grammar: {error}") from error
    return future.result()
