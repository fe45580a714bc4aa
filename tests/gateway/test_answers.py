"""Errors in OpenAI's shape."""

import json

import pytest

from sllm.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidArgument,
    NotFound,
    QueueFull,
    SllmError,
    Unavailable,
    all_errors,
)
from sllm.gateway.answers import plain_refusal, refusal, refusal_from_front_end


@pytest.mark.parametrize("cls", all_errors())
def test_every_error_has_openais_four_fields(cls: type[SllmError]) -> None:
    answer = refusal(cls("it broke"))
    assert set(answer.document["error"]) == {"message", "type", "param", "code"}
    assert answer.document["error"]["message"].startswith("it broke")
    assert 400 <= answer.status <= 599


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NotFound("x"), 404, "model_not_found"),
        (InvalidArgument("x"), 400, "invalid_argument"),
        (QueueFull("x", retry_after_s=2.1), 503, "queue_full"),
        (DeadlineExceeded("x"), 504, "deadline_exceeded"),
        (EngineFailed("x"), 503, "engine_failed"),
    ],
)
def test_status_and_code(error: SllmError, status: int, code: str) -> None:
    answer = refusal(error)
    assert (answer.status, answer.document["error"]["code"]) == (status, code)


def test_retry_after_is_in_whole_seconds_rounded_up() -> None:
    assert (b"retry-after", b"3") in refusal(QueueFull("x", retry_after_s=2.1)).headers
    assert (b"retry-after", b"1") in refusal(Unavailable("x")).headers
    assert refusal(InvalidArgument("x")).headers == []


def test_a_client_that_waited_in_vain_is_told_not_to_do_it_again_by_itself() -> None:
    assert refusal(DeadlineExceeded("x")).headers == [(b"x-should-retry", b"false")]


def test_hints_are_for_callers_not_for_operators() -> None:
    assert "try y" in refusal(InvalidArgument("x", hint="try y")).document["error"]["message"]
    assert "try y" not in refusal(Unavailable("x", hint="try y")).document["error"]["message"]


def test_an_event_is_one_line_of_json() -> None:
    event = refusal(EngineFailed("two\nlines")).event
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event[6:])["error"]["message"] == "two\nlines"


def test_a_front_ends_error_keeps_its_words_and_gets_openais_type() -> None:
    body = json.dumps({"error": {"message": "bad n", "type": "BadRequestError", "param": "n", "code": 400}}).encode()
    answer = refusal_from_front_end(body)
    assert answer.status == 400
    assert answer.document == {
        "error": {"message": "bad n", "type": "invalid_request_error", "param": "n", "code": None}
    }


@pytest.mark.parametrize("body", [b"", b"[]", b"oops", b'{"error": "text"}', b'{"error": {}}'])
def test_what_is_no_error_document_is_still_an_error(body: bytes) -> None:
    assert refusal_from_front_end(body).status == 500
    assert refusal_from_front_end(body, 422).status == 422


def test_plain_statuses() -> None:
    assert plain_refusal(404, "x").document["error"]["type"] == "invalid_request_error"
    assert plain_refusal(501, "x").document["error"]["type"] == "server_error"
