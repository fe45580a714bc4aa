"""The ASGI application: which paths there are, who may ask, which deployment is meant, and how it all ends.

OpenAI's routes and our health only: none of a front end's other routes can be reached.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from typing import Any

from sllm.config import GatewayConfig
from sllm.core.ids import RequestId, make_id
from sllm.core.route import Route
from sllm.errors import NotFound, SllmError
from sllm.gateway.answers import Headers, Refusal, plain_refusal, refusal
from sllm.gateway.dispatch import Dispatcher
from sllm.gateway.front_end import Message, Receive, Send
from sllm.gateway.frontends import FrontEnds
from sllm.gateway.inbound import ClientGone, Refused, head_of, inner_scope, read_body, replay, unless_gone
from sllm.gateway.keys import Keys
from sllm.gateway.reply import Reply, send_refusal
from sllm.gateway.request import OpenRequest, current_request
from sllm.gateway.routes import Routes

log = logging.getLogger(__name__)

_STREAMING_PATHS = {"/v1/chat/completions", "/v1/completions"}
_FRONT_END_PATHS = _STREAMING_PATHS | {"/tokenize", "/detokenize"}
_MODELS = "/v1/models"


class App:
    """The gateway's HTTP side."""

    def __init__(
        self, config: GatewayConfig, *, keys: Keys, routes: Routes, front_ends: FrontEnds, dispatcher: Dispatcher
    ) -> None:
        self._config = config
        self._keys = keys
        self._routes = routes
        self._front_ends = front_ends
        self._dispatcher = dispatcher

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request_id = RequestId(make_id("req", os.urandom(8)))
        headers: Headers = [(b"x-request-id", request_id.encode())]
        try:
            await self._answer(request_id, headers, scope, receive, send)
        except ClientGone:
            return
        except Refused as refused:
            await send_refusal(send, refused.answer, headers)
        except SllmError as error:
            await send_refusal(send, refusal(error), headers)
        except Exception:
            log.exception("%s failed", request_id)
            await send_refusal(send, refusal(SllmError("the gateway failed to answer")), headers)

    async def _answer(
        self, request_id: RequestId, headers: Headers, scope: Message, receive: Receive, send: Send
    ) -> None:
        method, path = scope["method"], scope["path"]
        if path == "/health":
            _check_method(method, "GET", path)
            await _send_json(send, {"status": "ok", "controller_connected": self._routes.connected}, headers)
            return
        self._keys.check()
        if path == _MODELS or path.startswith(f"{_MODELS}/"):
            _check_method(method, "GET", path)
            await _send_json(send, self._models(path), headers)
        elif path in _FRONT_END_PATHS:
            _check_method(method, "POST", path)
            await self._serve(request_id, headers, scope, receive, send)
        else:
            raise Refused(plain_refusal(404, f"there is no {method} {path} here", code="unknown_url"))

    def _models(self, path: str) -> dict[str, Any]:
        name = path.removeprefix(_MODELS).strip("/")
        if not name:
            self._routes.check_known()
            return {"object": "list", "data": [_model(route) for route in self._routes.all()]}
        return _model(self._route(name))

    def _route(self, name: str) -> Route:
        route = self._routes.get(name)
        if route is None:
            raise NotFound(f"the model {name!r} does not exist", hint="GET /v1/models lists those that do")
        return route

    async def _serve(
        self, request_id: RequestId, headers: Headers, scope: Message, receive: Receive, send: Send
    ) -> None:
        body = await read_body(receive, self._config.max_body_bytes)
        name, streaming = head_of(body)
        request = OpenRequest(
            id=request_id,
            deployment=self._route(name).deployment.spec.name,
            streaming=streaming and scope["path"] in _STREAMING_PATHS,
            started_at=time.time(),
            deadline=asyncio.get_running_loop().time() + self._config.queue_timeout_s,
        )
        reply = Reply(
            send,
            request,
            headers=headers,
            comment_after_s=self._config.comment_after_s,
            comment_every_s=self._config.comment_every_s,
        )
        request.interrupted = reply.expect_pause
        self._dispatcher.open(request)
        try:
            await self._run_front_end(request, body, scope, receive, reply)
            await reply.fail(SllmError("the front end gave no whole answer"))  # unless it did
        except SllmError as error:
            await reply.fail(error)
        except ClientGone:
            raise
        except Exception:
            log.exception("%s failed", request_id)
            await reply.fail(SllmError("the gateway failed to answer"))
        finally:
            reply.stop_comments()
            self._dispatcher.close(request)
        # A broken reply returns with its body unfinished: the server then closes the connection without the last
        # chunk, which is how the client's side knows.

    async def _run_front_end(
        self, request: OpenRequest, body: bytes, scope: Message, receive: Receive, reply: Reply
    ) -> None:
        current_request.set(request)
        while True:
            request.phase = "waiting for the front end"
            with self._front_ends.use(request.deployment, request.revision) as lease:
                request.accepts = lease.accepts
                waiting = lease.front_end()
                front_end = await (waiting if lease.is_made else unless_gone(waiting, receive))
                await front_end(inner_scope(scope, request.id), replay(body, receive), reply)
            if not request.restart:
                return
            request.reopen()
            reply.reopen()


def _model(route: Route) -> dict[str, Any]:
    deployment = route.deployment
    return {
        "id": deployment.spec.name,
        "object": "model",
        "created": int(deployment.created_at),
        "owned_by": "sllm",
        "max_model_len": route.max_model_len,
    }


def _check_method(method: str, allowed: str, path: str) -> None:
    if method != allowed:
        answer = plain_refusal(405, f"{path} takes {allowed}, not {method}")
        raise Refused(Refusal(status=405, document=answer.document, headers=[(b"allow", allowed.encode())]))


async def _send_json(send: Send, document: dict[str, Any], headers: Headers) -> None:
    body = json.dumps(document, ensure_ascii=False).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
