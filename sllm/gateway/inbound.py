"""What comes in from a client: its body, what of it matters here, whether the client is still there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from sllm.core.ids import RequestId
from sllm.errors import InvalidArgument
from sllm.gateway.answers import Refusal, plain_refusal
from sllm.gateway.front_end import Message, Receive

T = TypeVar("T")


class Refused(Exception):
    """An answer that is not one of our errors: a status that only HTTP knows."""

    def __init__(self, answer: Refusal) -> None:
        super().__init__(answer.status)
        self.answer = answer


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def read_body(receive: Receive, limit: int) -> bytes:
    """Return the whole body. Raises Refused if it is larger than `limit` bytes, ClientGone if it does not end."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise Refused(plain_refusal(413, f"the body is larger than {limit} bytes", code="body_too_large"))
        if not message.get("more_body", False):
            return b"".join(chunks)


def head_of(body: bytes) -> tuple[str, bool]:
    """Return the model that a body names, and whether it wants a stream. All else is the front end's to check."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the body is not JSON: {error}") from None
    name = document.get("model") if isinstance(document, dict) else None
    if not isinstance(name, str) or not name:
        raise Refused(plain_refusal(400, "the body must name a model", param="model", code="invalid_argument"))
    return name, document.get("stream") is True


def inner_scope(scope: Message, request_id: RequestId) -> Message:
    """Return what the front end sees of a request: none of the client's headers may steer it."""
    return {
        "type": "http",
        "asgi": scope["asgi"],
        "http_version": scope["http_version"],
        "method": "POST",
        "scheme": scope["scheme"],
        "path": scope["path"],
        "raw_path": scope["path"].encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())],
        "client": scope.get("client"),
        "server": scope.get("server"),
        "state": {},
    }


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once more, and after it what the client does next."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Wait for `work` while the client does. Raises ClientGone when it goes away."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
