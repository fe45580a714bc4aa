"""Errors as OpenAI's clients know them: status, headers and body, or one event of a stream that has begun."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from sllm.errors import DeadlineExceeded, NotFound, SllmError, outcome_of

Headers = list[tuple[bytes, bytes]]

_RETRY_REASONS = {"QUEUE_FULL", "UNAVAILABLE"}
_DEFAULT_RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An error answer: its HTTP status, its document, its headers beyond content type and length."""

    status: int
    document: dict[str, Any]
    headers: Headers = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return json.dumps(self.document, ensure_ascii=False).encode()

    @property
    def event(self) -> bytes:
        """The same as a server-sent event. openai's client raises for it; for a body that just ends it would not."""
        return b"data: " + self.body + b"\n\n"


def document(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error document."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: SllmError, *, param: str | None = None) -> Refusal:
    """Return the answer for one of our errors. A hint is for whoever can act on it: the caller of a wrong request."""
    outcome = outcome_of(error)
    message = f"{error.message} ({error.hint})" if error.hint and outcome.http < 500 else error.message
    code = "model_not_found" if isinstance(error, NotFound) else error.reason.lower()
    return Refusal(
        status=outcome.http,
        document=document(message, kind=outcome.openai_type, param=param, code=code),
        headers=_retry_headers(error),
    )


def _retry_headers(error: SllmError) -> Headers:
    if isinstance(error, DeadlineExceeded):
        # The client has waited for minutes: doing it again by itself would only double the load.
        return [(b"x-should-retry", b"false")]
    if error.retry_after_s is not None:
        return [(b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s)))]
    if error.reason in _RETRY_REASONS:
        return [(b"retry-after", b"%d" % _DEFAULT_RETRY_AFTER_S)]
    return []


_KINDS = {
    400: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def plain_refusal(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Refusal:
    """Return an answer for a plain HTTP status."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return Refusal(status=status, document=document(message, kind=kind, param=param, code=code))


def refusal_from_front_end(body: bytes, status: int | None = None) -> Refusal:
    """Return a front end's own error (`{"error": {...}}`, with the status in `code`) in OpenAI's terms.

    `status` is that of its HTTP answer; None where the error came as an event.
    """
    try:
        error = json.loads(body)["error"]
        message, param, code = str(error["message"]), error.get("param"), error.get("code")
    except (ValueError, TypeError, KeyError):
        message, param, code = "the front end failed", None, None
    if status is None:
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    return plain_refusal(status, message, param=param, code=code if isinstance(code, str) else None)
