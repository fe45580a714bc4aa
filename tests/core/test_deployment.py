"""Deployment specs: checked when made, compared by what a replica would notice."""

import dataclasses
from typing import Any

import pytest

from sllm.core.deployment import DeploymentSpec
from sllm.core.engine_args import ENGINE_ARGS, Taker, flags_for
from sllm.core.ids import CheckpointName, DeploymentName
from sllm.errors import InvalidArgument

SPEC = DeploymentSpec(name=DeploymentName("chat"), checkpoint=CheckpointName("demo"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_replicas": 2, "max_replicas": 1},
        {"min_replicas": -1},
        {"max_replicas": 0},
        {"devices": 0},
        {"target_concurrency": 0},
        {"keep_alive_s": -1.0},
        {"max_model_len": 0},
        {"name": "a b"},
        {"checkpoint": "a/b"},
        {"engine_args": {"trust_remote_code": "true"}},
    ],
)
def test_a_wrong_spec_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        dataclasses.replace(SPEC, **wrong)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"min_replicas": 1}, True),
        ({"max_replicas": 3}, True),
        ({"keep_alive_s": 1.0}, True),
        ({"checkpoint": "other"}, False),
        ({"max_model_len": 128}, False),
        ({"engine_args": {"dtype": "float32"}}, False),
        ({"target_concurrency": 4}, False),
    ],
)
def test_only_what_a_replica_would_notice_needs_new_replicas(change: dict[str, Any], same: bool) -> None:
    assert dataclasses.replace(SPEC, **change).serves_like(SPEC) is same


def test_an_unknown_engine_argument_names_its_nearest_neighbour() -> None:
    with pytest.raises(InvalidArgument) as caught:
        dataclasses.replace(SPEC, engine_args={"dtypes": "float32"})
    assert "'dtype'" in caught.value.hint


def test_nothing_that_runs_code_or_reads_paths_is_an_engine_argument() -> None:
    dangerous = {
        "trust_remote_code",
        "middleware",
        "tool_parser_plugin",
        "worker_cls",
        "scheduler_cls",
        "chat_template",
    }
    assert not dangerous & set(ENGINE_ARGS)


def test_flags_are_made_for_their_taker_only() -> None:
    args = {"dtype": "float32", "enforce_eager": "true", "tool_call_parser": "hermes", "enable_prefix_caching": "False"}
    assert flags_for(args, Taker.ENGINE) == ["--dtype=float32", "--no-enable-prefix-caching", "--enforce-eager"]
    assert flags_for(args, Taker.FRONT_END) == ["--dtype=float32", "--tool-call-parser=hermes"]
