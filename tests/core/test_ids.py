"""Names: what is allowed, and that nothing else gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.core.ids import checkpoint_name, deployment_name, make_id, node_name
from sllm.errors import InvalidArgument


@pytest.mark.parametrize("name", ["a", "llama-3.1_8B", "0x", "A" * 128])
def test_plain_names_are_accepted(name: str) -> None:
    assert node_name(name) == checkpoint_name(name) == deployment_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "_a", "a b", "a/b/c", "/a", "a/", "ä", "a\n", "A" * 129, "a/../b"]
)
def test_other_names_are_refused_with_a_hint(name: str) -> None:
    for check in (node_name, checkpoint_name, deployment_name):
        with pytest.raises(InvalidArgument) as caught:
            check(name)
        assert caught.value.hint


def test_only_a_deployment_name_may_have_one_slash() -> None:
    assert deployment_name("org/model") == "org/model"
    with pytest.raises(InvalidArgument):
        checkpoint_name("org/model")


@given(st.text())
def test_an_accepted_name_is_safe_as_a_single_path_component(name: str) -> None:
    try:
        checkpoint_name(name)
    except InvalidArgument:
        return
    assert "/" not in name
    assert "\0" not in name
    assert name not in (".", "..")


def test_ids_carry_their_kind() -> None:
    assert make_id("rep", bytes(8)) == "rep-0000000000000000"
    with pytest.raises(ValueError, match="entropy"):
        make_id("rep", b"x")
