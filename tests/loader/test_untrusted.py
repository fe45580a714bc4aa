"""JSON of others."""

from __future__ import annotations

import pytest

from sllm.errors import InvalidCheckpoint, ManifestMalformed
from sllm.loader.untrusted import json_object


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "x is not JSON"),
        (b"\xff", "x is not JSON"),
        (b"[" * 100_000, "x is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "x is not JSON"),
        (b"[]", "x is not a JSON object"),
        (b'{"a": {"b": 1, "b": 1}}', "x has a name twice"),
    ],
)
def test_what_is_no_object_is_an_error_of_the_callers_choice(data: bytes, message: str) -> None:
    for wrong in (InvalidCheckpoint, ManifestMalformed):
        with pytest.raises(InvalidCheckpoint, match=message) as raised:
            json_object(data, "x", wrong=wrong)
        assert type(raised.value) is wrong


def test_an_object_comes_back_in_its_order() -> None:
    assert list(json_object(b'{"b": 1, "a": [2]}', "x").items()) == [("b", 1), ("a", [2])]
    assert json_object(b'{"a": 1, "a": 2}', "x", unique=False) == {"a": 2}
