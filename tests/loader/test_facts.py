"""What a model's configuration and its index of shards say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sllm.errors import InvalidCheckpoint
from sllm.loader.facts import DEFAULT_MAX_MODEL_LEN, check_tensors_present, model_facts, shards_in_index
from sllm.loader.safetensors import StoredTensor


def facts_of(**config: Any) -> tuple[str, int]:
    found = model_facts(json.dumps({"architectures": ["X", "Y"], **config}).encode())
    return found.architecture, found.max_model_len


def test_the_first_architecture_is_the_models() -> None:
    assert facts_of(max_position_embeddings=7) == ("X", 7)


def test_the_length_of_a_model_with_text_and_more_is_that_of_its_text() -> None:
    assert facts_of(text_config={"n_positions": 5}) == ("X", 5)
    assert facts_of(text_config={"n_positions": 5}, n_ctx=6) == ("X", 6)


@pytest.mark.parametrize("name", ["", "\ud800", "X\n", "X\x1b[2J", "X" * 257])
def test_an_architecture_is_a_short_printable_text(name: str) -> None:
    with pytest.raises(InvalidCheckpoint, match="which no model has"):
        facts_of(architectures=[name])
    assert facts_of(architectures=["X" * 256])[0] == "X" * 256


@pytest.mark.parametrize("length", [0, -1, True, 1.5, "9", None, 1 << 31])
def test_a_length_that_cannot_be_is_passed_over(length: Any) -> None:
    assert facts_of(n_ctx=length) == ("X", DEFAULT_MAX_MODEL_LEN)


def test_a_config_may_say_a_thing_twice_as_some_do() -> None:
    """The last one holds, as for everybody who reads such a file with Python."""
    assert model_facts(b'{"architectures": ["X"], "n_ctx": 3, "n_ctx": 4}').max_model_len == 4


@pytest.mark.parametrize("shard", ["../x.safetensors", "x.bin", "", 3, None])
def test_an_index_names_nothing_but_shards(shard: Any) -> None:
    with pytest.raises(InvalidCheckpoint, match="no shard's name"):
        shards_in_index(json.dumps({"weight_map": {"w": shard}}).encode(), "index")


def test_a_tensor_is_in_one_shard_which_is_that_of_the_index() -> None:
    one, other = (
        StoredTensor(name="w", shard=shard, offset=8, size_bytes=4, dtype="float32", shape=(1,))
        for shard in ("a.safetensors", "b.safetensors")
    )
    check_tensors_present({"w": "a.safetensors"}, [one])
    with pytest.raises(InvalidCheckpoint, match="in a.safetensors and in b.safetensors"):
        check_tensors_present({}, [one, other])
    with pytest.raises(InvalidCheckpoint, match="b.safetensors holds tensor 'w', but it does not"):
        check_tensors_present({"w": "b.safetensors"}, [one])
