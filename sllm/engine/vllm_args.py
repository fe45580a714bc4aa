"""A launch -> vLLM's configuration. Refuses what cannot work before anything is allocated."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any, NoReturn

from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMClientError
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from sllm.core.device import DeviceKind
from sllm.core.engine_args import Taker, flags_for
from sllm.core.launch import Launch
from sllm.engine.vllm_errors import config_error
from sllm.engine.vllm_loader import LOAD_FORMAT
from sllm.engine.vllm_setup import import_architecture
from sllm.errors import InvalidArgument, InvalidCheckpoint, SllmError

_CPU_BLOCK_SIZE = 32  # the smallest that vLLM's CPU attention takes; its own default is 128


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArgument(f"engine arguments: {message}")


@functools.cache
def parser() -> Any:
    """Return the parser of vLLM's engine flags. Building it is slow: the warm process does it ahead."""
    return EngineArgs.add_cli_args(_Parser())


def engine_config(launch: Launch) -> Any:
    """Return the VllmConfig of a launch.

    Raises InvalidArgument for wrong engine arguments, UnsupportedCheckpoint for a model that vLLM does not serve.
    """
    args = engine_args(launch)
    for architecture in _architectures(launch):
        import_architecture(architecture)
    try:
        return args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    except SllmError:
        raise
    except (ValueError, NotImplementedError, VLLMClientError) as error:  # pydantic's errors are ValueErrors
        raise config_error(error) from error


def engine_args(launch: Launch) -> EngineArgs:
    """Return vLLM's arguments: the deployment's own, then ours, which it cannot set."""
    spec = launch.spec
    args = _deployments_own(launch)
    args.tokenizer = launch.execution_dir
    args.load_format = LOAD_FORMAT
    args.max_model_len = spec.max_model_len
    args.max_num_seqs = spec.capacity
    args.distributed_executor_backend = "uni"
    args.disable_log_stats = True
    args.mm_processor_cache_gb = 0
    # Loaded when the first request with a grammar comes: a large tokenizer takes longer than a small model. Only a
    # reasoning parser needs it from the start, to find its marks.
    args.skip_tokenizer_init = "reasoning_parser" not in spec.engine_args
    if launch.device_kind == DeviceKind.CPU:
        _for_cpu(args, launch)
    elif len(launch.device_ids) > 1:
        raise InvalidArgument("a replica on more than one GPU is not supported yet", hint="deploy with --devices 1")
    return args


def _deployments_own(launch: Launch) -> EngineArgs:
    flags = [f"--model={launch.execution_dir}", *flags_for(launch.spec.engine_args, Taker.ENGINE)]
    try:
        return EngineArgs.from_cli_args(parser().parse_args(flags))
    except (ValueError, TypeError, argparse.ArgumentTypeError, VLLMClientError) as error:
        raise InvalidArgument(f"engine arguments: {error}") from error


def _for_cpu(args: EngineArgs, launch: Launch) -> None:
    given = launch.spec.engine_args
    if given.get("enable_chunked_prefill", "false").lower() == "true":
        # A seeded request whose prompt is split breaks vLLM's CPU runner, and with it every other request.
        raise InvalidArgument("enable_chunked_prefill is not available on CPU devices")
    args.enable_chunked_prefill = False
    # Unsplit, the longest prompt must fit in a step even while all others decode.
    args.max_num_batched_tokens = max(
        args.max_num_batched_tokens or 0, launch.spec.max_model_len + launch.spec.capacity
    )
    if "block_size" not in given:
        # Whoever resumes a request computes the partly filled block again. See docs/decisions/0012-block-size.md.
        args.block_size = _CPU_BLOCK_SIZE
    if "kv_cache_memory_bytes" not in given:
        args.kv_cache_memory_bytes = launch.kv_cache_bytes
    if "enforce_eager" not in given:
        args.enforce_eager = True


def _architectures(launch: Launch) -> list[str]:
    path = Path(launch.execution_dir) / "config.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"checkpoint {launch.spec.checkpoint!r} has no usable config.json: {error}") from error
    return [str(name) for name in names or ()]
