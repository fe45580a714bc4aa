"""vLLM's own OpenAI front end for one deployment, over a RemoteEngine. Everything private to vLLM is here and in
`vllm_outputs`.

The seam is `EngineCoreClient.make_async_mp_client`: what AsyncLLM calls to start an engine returns our client instead.
Configuration and tokenizer are read in a thread, because they may take seconds and tokens must go on flowing.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import json
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from sllm.gateway import vllm_environment

vllm_environment.set_up()

import torch  # noqa: E402
import vllm  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.entrypoints.launchers.api_server.app_state import init_app_state  # noqa: E402
from vllm.entrypoints.launchers.app import build_app  # noqa: E402
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args  # noqa: E402
from vllm.entrypoints.launchers.launcher import validate_api_server_args  # noqa: E402
from vllm.model_executor.models import ModelRegistry  # noqa: E402
from vllm.usage.usage_lib import UsageContext  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.engine.core_client import EngineCoreClient  # noqa: E402

from sllm.core.engine_args import Taker, flags_for  # noqa: E402
from sllm.core.vllm_versions import TESTED_VERSIONS  # noqa: E402
from sllm.errors import InvalidArgument, InvalidConfiguration, SllmError, UnsupportedCheckpoint  # noqa: E402
from sllm.gateway.execution_files import ExecutionFiles  # noqa: E402
from sllm.gateway.front_end import FrontEnd, Message, Receive, Recipe, Send  # noqa: E402
from sllm.gateway.remote_engine import RemoteEngine, Submitter  # noqa: E402
from sllm.gateway.vllm_outputs import order_of, outputs_of, problem_with  # noqa: E402

log = logging.getLogger(__name__)

_TASKS = ("generate",)
_MAX_REASON = 400


def prepare() -> None:
    """Make vLLM ready for front ends, once per process. Raises InvalidConfiguration for a version not tested."""
    version = vllm.__version__.partition("+")[0]
    if version not in TESTED_VERSIONS:
        raise InvalidConfiguration(
            f"vLLM {version} is installed, the gateway is made for {', '.join(TESTED_VERSIONS)}",
            hint="install the version that the extra `cpu` or `gpu` names",
        )
    torch.set_num_threads(1)
    EngineCoreClient.make_async_mp_client = staticmethod(_make_client)
    _parser()
    gc.collect()
    gc.freeze()  # what was imported need not be walked by every collection


_client_to_use: ContextVar[_Client] = ContextVar("_client_to_use")


def _make_client(*_: object, **__: object) -> EngineCoreClient:
    return _client_to_use.get()


class _Client(EngineCoreClient):
    """AsyncLLM's view of a RemoteEngine. `draw_seed` gives seeds for what is sampled without one."""

    def __init__(self, engine: RemoteEngine, draw_seed: Callable[[], int]) -> None:
        self._engine = engine
        self._draw_seed = draw_seed
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]

    async def add_request_async(self, request: Any) -> None:
        order, problem = order_of(request, self._draw_seed), problem_with(request)
        if problem is None:
            self._engine.add(order)
        else:
            self._engine.refuse(order, problem)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self._engine.abort(request_ids)

    async def get_output_async(self) -> Any:
        return outputs_of(await self._engine.step())

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return _TASKS

    def shutdown(self, timeout: float | None = None) -> None:
        """There is nothing to shut down: the engines are not ours."""


class VllmBuilder:
    """Makes vLLM front ends from execution files. `random_bytes(n)` is where seeds come from."""

    def __init__(
        self, files: ExecutionFiles, dispatcher: Submitter, random_bytes: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._files = files
        self._dispatcher = dispatcher
        self._random_bytes = random_bytes

    def _draw_seed(self) -> int:
        return int.from_bytes(self._random_bytes(8)) >> 1  # vLLM's seeds are signed, and -1 is none

    async def __call__(self, recipe: Recipe, sources: tuple[str, ...]) -> FrontEnd:
        folder = await self._files.folder_of(recipe.digest, sources)
        client = _Client(RemoteEngine(self._dispatcher), self._draw_seed)
        try:
            args = _parse(recipe, folder)
            llm = await asyncio.to_thread(_make_llm, args, client, _architectures(folder))
            app = build_app(args, _TASKS, llm.model_config)
            # The layers around the routes (CORS, metrics) would each be passed by every token.
            app.user_middleware.clear()
            app.middleware_stack = None  # built anew with the first request
            app.state.server = SimpleNamespace(should_exit=False)
            await init_app_state(llm, app.state, args, _TASKS)
        except SllmError:
            raise
        except Exception as error:
            log.debug("the front end of %s failed", recipe.deployment, exc_info=True)
            raise UnsupportedCheckpoint(f"vLLM's front end refused it: {_in_one_line(error)}") from error
        gc.freeze()
        log.info("the front end of %s is ready", recipe.deployment)
        return _VllmFrontEnd(app, llm)


class _VllmFrontEnd:
    def __init__(self, app: Callable[..., Any], llm: Any) -> None:
        self._app = app
        self._llm = llm

    @property
    def healthy(self) -> bool:
        return not self._llm.errored

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def close(self) -> None:
        self._llm.shutdown()


def _architectures(folder: Path) -> list[str]:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return [name for name in values.get("architectures") or () if isinstance(name, str)]


@functools.cache
def _import_architecture(name: str) -> None:
    """Import a model's code in this process. Without it vLLM inspects it in a new interpreter: ten seconds and more."""
    registered = ModelRegistry.models.get(name)
    if registered is not None:
        ModelRegistry.register_model(name, registered.load_model_cls())


def _make_llm(args: Any, client: _Client, architectures: list[str]) -> Any:
    _client_to_use.set(client)
    for name in architectures:
        _import_architecture(name)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    try:
        validate_api_server_args(args)  # reads what the line above has filled in
    except KeyError as error:
        raise InvalidArgument(f"engine arguments: {error.args[0]}") from error
    return AsyncLLM.from_vllm_config(config, UsageContext.OPENAI_API_SERVER, disable_log_stats=True)


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArgument(f"engine arguments: {message}")


@functools.cache
def _parser() -> FlexibleArgumentParser:
    return make_arg_parser(_Parser())


def _parse(recipe: Recipe, folder: Path) -> Any:
    flags = [
        f"--model={folder}",
        f"--served-model-name={recipe.deployment}",
        f"--max-model-len={recipe.max_model_len}",
        # The engine's part of the configuration only has to be consistent here; the engine host has its own.
        f"--max-num-batched-tokens={max(recipe.max_model_len, 2048)}",
        "--enforce-eager",
        "--disable-log-stats",
        "--disable-fastapi-docs",
        *flags_for(dict(recipe.engine_args), Taker.FRONT_END),
    ]
    # vLLM writes into its configurations, and the parser gives each front end the same ones where nothing is asked.
    args = copy.deepcopy(_parser().parse_args(flags))
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"engine arguments: {_in_one_line(error)}") from error
    return args


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
