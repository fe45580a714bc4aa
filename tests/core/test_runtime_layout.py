"""The key of a runtime layout: what must be the same for an engine to use what another one saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sllm.core.device import DeviceKind
from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, ReplicaId
from sllm.core.replica import ReplicaSpec
from sllm.core.runtime_layout import is_saved, runtime_key, will_be_saved

SPEC = ReplicaSpec(
    id=ReplicaId("rep-1"),
    deployment=DeploymentName("story"),
    revision=1,
    generation=1,
    checkpoint=CheckpointName("demo"),
    digest="sha256:1",
    devices=(DeviceId("cpu-0"),),
    capacity=4,
    max_model_len=128,
)


def key(spec: ReplicaSpec = SPEC, **changes: Any) -> dict[str, str]:
    values = {"engine": "vllm", "version": "1", "device_kind": DeviceKind.CPU, "world_size": 1, "rank": 0, **changes}
    return runtime_key(spec, **values)


@pytest.mark.parametrize(
    "changes",
    [{"engine": "fake"}, {"version": "2"}, {"device_kind": DeviceKind.CUDA}, {"world_size": 2}, {"rank": 1}],
    ids=str,
)
def test_another_engine_or_place_in_it_is_another_layout(changes: dict[str, Any]) -> None:
    assert key(**changes) != key()


@pytest.mark.parametrize("name", ["dtype", "quantization", "hf_overrides", "kv_cache_dtype"])
def test_arguments_that_change_parameters_are_in_it(name: str) -> None:
    assert key(replace(SPEC, engine_args={name: "x"})) != key()


def test_another_checkpoint_is_another_layout() -> None:
    assert key(replace(SPEC, digest="sha256:2")) != key()


def test_replicas_revisions_and_sizes_of_batches_share_one() -> None:
    other = replace(
        SPEC,
        id=ReplicaId("rep-2"),
        deployment=DeploymentName("other"),
        revision=2,
        generation=9,
        checkpoint=CheckpointName("alias"),
        capacity=64,
        max_model_len=64,
        engine_args={"seed": "3", "block_size": "16"},
    )
    assert key(other) == key()


def test_agent_and_engine_host_say_a_device_kind_in_the_same_way() -> None:
    assert key(device_kind="cpu") == key(device_kind=DeviceKind.CPU)


LLAMA = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("architectures", "quantised", "saved"),
    [
        (["LlamaForCausalLM"], False, True),
        (["LlamaForCausalLM"], True, False),
        (["LlamaForCausalLM", "OddForCausalLM"], False, False),
        ([], False, False),
    ],
)
def test_what_is_known_to_be_all_in_its_parameters_is_saved(
    architectures: list[str], quantised: bool, saved: bool
) -> None:
    assert is_saved(architectures, quantised=quantised) is saved


@pytest.mark.parametrize(
    ("config", "engine_args", "saved"),
    [
        (LLAMA, {}, True),
        (LLAMA, {"dtype": "float32", "hf_overrides": '{"rope_theta": 1e6}'}, True),
        ({**LLAMA, "quantization_config": None}, {}, True),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, {}, False),
        ({**LLAMA, "compression_config": {"format": "x"}}, {}, False),
        (LLAMA, {"quantization": "fp8"}, False),
        (LLAMA, {"hf_overrides": '{"architectures": ["OddForCausalLM"]}'}, False),
        ({"architectures": ["OddForCausalLM"]}, {"hf_overrides": '{"architectures": ["LlamaForCausalLM"]}'}, True),
        (LLAMA, {"hf_overrides": "no JSON"}, True),
        ({}, {}, False),
        ({"architectures": "LlamaForCausalLM"}, {}, False),
        ({"architectures": [1]}, {}, False),
    ],
)
def test_a_start_is_known_to_save_from_what_configures_it(
    config: dict[str, Any], engine_args: dict[str, str], saved: bool
) -> None:
    assert will_be_saved(config, engine_args) is saved
