"""What reaches the client of a front end's answer: it stands between the front end and the server as ASGI's `send`.

The beginning of an answer is held back until there is something to send, so that what goes wrong before has an HTTP
status of its own. A stream that waits longer gets comment lines, also in its middle; from then on, and from the first
token on, an error is an event in the stream, and the body is left unfinished, because a client sees no error in a body
that just ends.
"""

from __future__ import annotations

import asyncio
import logging

from sllm.errors import SllmError
from sllm.gateway.answers import Headers, Refusal, plain_refusal, refusal, refusal_from_front_end
from sllm.gateway.front_end import Message, Send
from sllm.gateway.request import OpenRequest

log = logging.getLogger(__name__)

_ERROR_EVENT = b'data: {"error"'
_EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")


class Reply:
    """One client's answer. `broken` is set when the body must be left unfinished."""

    def __init__(
        self, send: Send, request: OpenRequest, *, headers: Headers, comment_after_s: float, comment_every_s: float
    ) -> None:
        self._send = send
        self._request = request
        self._headers = headers
        self._comment_after_s = comment_after_s
        self._comment_every_s = comment_every_s
        self._start: Message | None = None  # the front end's, held back
        self._begun = False  # the client has had the beginning of an answer
        self._passing = False  # a good answer is under way
        self._over = False
        self._refused_body = b""
        self._commenting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.broken = False
        if request.streaming:
            self._await_comments()

    async def __call__(self, message: Message) -> None:
        """Take a message of the front end."""
        if self._passing and message["more_body"] and not message["body"].startswith(_ERROR_EVENT):
            await self._send(message)  # the hot path: one token
        elif not self._over:
            await self._take(message)

    async def refuse(self, answer: Refusal) -> None:
        """Answer with an error: as an HTTP answer, or within the stream that has begun."""
        self._over, self._passing = True, False
        self.stop_comments()
        if not self._begun:
            await send_refusal(self._send, answer, self._headers)
        else:
            self.broken = True
            await self._send({"type": "http.response.body", "body": answer.event, "more_body": True})

    async def fail(self, error: SllmError) -> None:
        """Answer with one of our errors, unless the answer is over already."""
        if not self._over:
            await self.refuse(refusal(error))

    def reopen(self) -> None:
        """Forget what the front end has said; another one will answer."""
        self._start, self._over = None, False

    def expect_pause(self) -> None:
        """Nothing may come for a while in the middle of an answer: a stream gets comments until it goes on."""
        if self._passing and not self._over and self._request.streaming:
            self._passing = False  # the next token ends them, off the hot path
            self._await_comments()

    def _await_comments(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._comment_after_s, self._begin_comments)

    def stop_comments(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._commenting is not None:
            self._commenting.cancel()
            self._commenting = None

    async def _take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._start is not None and self._start["status"] >= 400:
            await self._take_refusal(self._start["status"], body, more)
        elif body.startswith(_ERROR_EVENT):
            await self._end_with(refusal_from_front_end(body.removeprefix(b"data: ").split(b"\n", 1)[0]))
        elif self._request.failure is not None or self._request.restart:
            # A front end may begin its answer (with the role) before it says that the request failed.
            await self._end_with(plain_refusal(500, "the answer is not whole"))
        elif body or not more:
            await self._pass(message)

    async def _take_refusal(self, status: int, body: bytes, more: bool) -> None:
        self._refused_body += body
        if not more:
            document, self._refused_body = self._refused_body, b""
            await self._end_with(refusal_from_front_end(document, status))

    async def _end_with(self, answer: Refusal) -> None:
        """End badly. What we know of the failure goes before what the front end makes of it."""
        if self._request.restart:
            self._over = True
            return
        if self._request.failure is not None:
            answer = refusal(self._request.failure)
        await self.refuse(answer)

    async def _pass(self, message: Message) -> None:
        self.stop_comments()
        if not self._begun:
            assert self._start is not None
            self._begun = True
            headers = [*self._start["headers"], *self._headers]
            await self._send({"type": "http.response.start", "status": self._start["status"], "headers": headers})
        self._passing = True
        self._over = not message.get("more_body", False)
        await self._send(message)
        if self._request.target is None and self._request.sequences:
            self.expect_pause()  # these were the last tokens of a replica that it has lost meanwhile

    def _begin_comments(self) -> None:
        self._commenting = asyncio.create_task(self._comment())

    async def _comment(self) -> None:
        if not self._begun:
            self._begun = True
            headers = [_EVENT_STREAM, (b"cache-control", b"no-cache"), *self._headers]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            line = f": {_progress(self._request)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": line, "more_body": True})
            await asyncio.sleep(self._comment_every_s)


def _progress(request: OpenRequest) -> str:
    phase = " ".join(request.phase.split())  # a line break would end the comment
    return phase if request.progress is None else f"{phase} {request.progress:.0%}"


async def send_refusal(send: Send, answer: Refusal, headers: Headers) -> None:
    """Send a whole error answer."""
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer.body))]
    await send({"type": "http.response.start", "status": answer.status, "headers": [*own, *answer.headers, *headers]})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})
