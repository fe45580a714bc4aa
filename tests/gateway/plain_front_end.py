"""A front end without vLLM, for what the gateway itself does."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from gateway.fake_processes import text_of, tokens_of

from sllm.core.tokens import (
    FinishReason,
    TokenOutput,
)
from sllm.errors import SllmError
from sllm.gateway.dispatch import Dispatcher
from sllm.gateway.execution_files import ExecutionFiles
from sllm.gateway.front_end import FrontEnd, Message, Receive, Recipe, Send
from sllm.gateway.remote_engine import Order, RemoteEngine


class PlainFrontEnd:
    """Speaks like vLLM's as far as the gateway can tell: an event per output, in-band errors, [DONE] at the end."""

    def __init__(self, dispatcher: Dispatcher, recipe: Recipe) -> None:
        self.engine = RemoteEngine(dispatcher)
        self.recipe = recipe
        self.healthy = True
        self.closed = False
        self._queues: dict[str, asyncio.Queue[tuple[str, TokenOutput]]] = {}
        self._pump = asyncio.create_task(self._run())
        self._count = 0

    async def _run(self) -> None:
        while True:
            step = await self.engine.step()
            for key, output in step.batch:
                if key in self._queues:
                    self._queues[key].put_nowait((key, output))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        if body.get("wrong"):
            await self._json(send, 400, {"error": {"message": "wrong", "type": "BadRequestError", "code": 400}})
            return
        answering = asyncio.create_task(self._answer(body, send))
        leaving = asyncio.create_task(_until_disconnect(receive))
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, body: dict[str, Any], send: Send) -> None:
        stream = body.get("stream", False)
        self._count += 1
        keys = [f"{self._count}.{i}" for i in range(body.get("n", 1))]
        if stream:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        text, failed = "", False
        try:
            async for key, output in self._outputs(keys, body):
                failed = failed or (output.finish is not None and output.finish.reason is FinishReason.ERROR)
                text += text_of(output.token_ids)
                if stream and not failed:
                    choice = int(key.partition(".")[2])
                    event = {"id": scopeless(body), "choice": choice, "text": text_of(output.token_ids)}
                    await self._event(send, event)
                if failed:
                    break
        finally:
            self.engine.abort(keys)
        error = {"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}}
        if not stream:
            await self._json(send, *((500, error) if failed else (200, {"text": text, "digest": self.recipe.digest})))
            return
        if failed:
            await self._event(send, error)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _outputs(self, keys: list[str], body: dict[str, Any]) -> AsyncIterator[tuple[str, TokenOutput]]:
        queue: asyncio.Queue[tuple[str, TokenOutput]] = asyncio.Queue()
        prompt = tokens_of(body.get("prompt", "?"))
        max_tokens = body.get("max_tokens", 100)
        for i, key in enumerate(keys):
            params = {"max_tokens": max_tokens, "suffix": body.get("suffixes", [""] * len(keys))[i]}
            self._queues[key] = queue
            self.engine.add(
                Order(key=key, prompt=prompt, sampling_params=json.dumps(params).encode(), max_tokens=max_tokens)
            )
        left = len(keys)
        while left:
            key, output = await queue.get()
            left -= output.finish is not None
            yield key, output

    async def _event(self, send: Send, document: dict[str, Any]) -> None:
        body = b"data: " + json.dumps(document).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _json(self, send: Send, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def close(self) -> None:
        self.closed = True
        self._pump.cancel()


def scopeless(body: dict[str, Any]) -> str:
    return f"plain-{body['model']}"


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class PlainBuilder:
    """Makes PlainFrontEnds. `gate` holds builds back; `problem` makes them fail."""

    def __init__(self, files: ExecutionFiles, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.made: list[PlainFrontEnd] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.problem: SllmError | None = None

    async def __call__(self, recipe: Recipe, sources: tuple[str, ...]) -> FrontEnd:
        await self.gate.wait()
        if self.problem is not None:
            raise self.problem
        self.made.append(PlainFrontEnd(self._dispatcher, recipe))
        return self.made[-1]
