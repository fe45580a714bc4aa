"""From a launch to vLLM's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sllm.errors import InvalidArgument, InvalidCheckpoint, SllmError, UnsupportedCheckpoint

pytestmark = pytest.mark.vllm

Make = Callable[..., Any]


@pytest.fixture
def launch(make_launch: Make, tiny_llama: Path) -> Make:
    return lambda **changes: make_launch(**{"execution_dir": str(tiny_llama), **changes})


def test_our_own_arguments_are_set(vllm: SimpleNamespace, launch: Make, tiny_llama: Path) -> None:
    args = vllm.args.engine_args(launch(capacity=6, max_model_len=100, kv_cache_bytes=1 << 20))
    assert (args.model, args.tokenizer, args.load_format) == (str(tiny_llama), str(tiny_llama), "sllm")
    assert (args.max_model_len, args.max_num_seqs, args.kv_cache_memory_bytes) == (100, 6, 1 << 20)
    assert args.enforce_eager
    assert args.distributed_executor_backend == "uni"


def test_the_longest_prompt_fits_in_one_step_while_others_decode(vllm: SimpleNamespace, launch: Make) -> None:
    args = vllm.args.engine_args(launch(capacity=6, max_model_len=100))
    assert args.max_num_batched_tokens == 106
    assert args.enable_chunked_prefill is False
    given = launch(capacity=6, max_model_len=100, engine_args={"max_num_batched_tokens": "500"})
    assert vllm.args.engine_args(given).max_num_batched_tokens == 500


def test_blocks_on_a_cpu_are_as_small_as_its_attention_takes_them(vllm: SimpleNamespace, launch: Make) -> None:
    """16 would be less to compute again at a handover: when vLLM's kernels take it, think again (decision 0012)."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert vllm.args.engine_config(launch()).cache_config.block_size == 32
    assert [size.base for size in CPUAttentionBackend.get_supported_kernel_block_sizes()] == [32]
    assert vllm.args.engine_args(launch(engine_args={"block_size": "64"})).block_size == 64


def test_what_a_deployment_says_wins_over_our_defaults(vllm: SimpleNamespace, launch: Make) -> None:
    given = {"enforce_eager": "false", "kv_cache_memory_bytes": "2097152", "dtype": "float32", "seed": "5"}
    args = vllm.args.engine_args(launch(engine_args=given))
    assert (args.enforce_eager, args.kv_cache_memory_bytes, args.dtype, args.seed) == (False, 2 << 20, "float32", 5)


def test_arguments_of_the_front_end_are_left_to_it(vllm: SimpleNamespace, launch: Make) -> None:
    vllm.args.engine_args(launch(engine_args={"tool_call_parser": "hermes"}))


def test_a_tokenizer_is_loaded_ahead_only_for_a_reasoning_parser(vllm: SimpleNamespace, launch: Make) -> None:
    assert vllm.args.engine_config(launch()).model_config.skip_tokenizer_init
    reasons = vllm.args.engine_config(launch(engine_args={"reasoning_parser": "qwen3"}))
    assert not reasons.model_config.skip_tokenizer_init


@pytest.mark.parametrize(
    "given", [{"dtype": "float99"}, {"block_size": "many"}, {"enable_chunked_prefill": "true"}, {"hf_overrides": "{"}]
)
def test_a_wrong_value_is_refused_by_name(vllm: SimpleNamespace, launch: Make, given: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        vllm.args.engine_config(launch(engine_args=given))
    name = next(iter(given))
    assert name in caught.value.message.replace("-", "_")
    assert "\n" not in caught.value.message


def test_a_replica_on_two_gpus_is_refused(vllm: SimpleNamespace, launch: Make) -> None:
    with pytest.raises(InvalidArgument, match="more than one GPU"):
        vllm.args.engine_args(launch(device_kind="cuda", device_ids=("GPU-1", "GPU-2")))


def test_a_context_longer_than_the_model_is_refused(vllm: SimpleNamespace, launch: Make) -> None:
    with pytest.raises(InvalidArgument, match="max_model_len") as caught:
        vllm.args.engine_config(launch(max_model_len=100_000))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ('{"architectures": ["NoSuchModel"], "model_type": "llama"}', UnsupportedCheckpoint),
        ('{"architectures": ["NoSuchModel"], "model_type": "no-such-type"}', UnsupportedCheckpoint),
        ("{", InvalidCheckpoint),
    ],
)
def test_a_model_that_vllm_does_not_serve_is_refused(
    vllm: SimpleNamespace, make_launch: Make, tmp_path: Path, config: str, error: type[SllmError]
) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(error) as caught:
        vllm.args.engine_config(make_launch(execution_dir=str(tmp_path)))
    assert "\n" not in caught.value.message
