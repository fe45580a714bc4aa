"""Controller, agent and engine hosts as the gateway sees them, over real gRPC.

The hosts give out the bytes of a text as tokens, one per step, so that an answer can be read off the request.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from sllm.core.checkpoint import ExecutionFile
from sllm.core.migration import MigrationOrder, MigrationReport, Round
from sllm.core.route import Route, RouteTable, RouteTarget
from sllm.core.tokens import (
    AbortRequests,
    ClientFrame,
    Finish,
    FinishReason,
    Logprobs,
    Moved,
    OpenStream,
    Prefill,
    StepOutputs,
    TokenOutput,
    TokenRequest,
)
from sllm.errors import NotFound, SllmError, StaleGeneration
from sllm.rpc.agents import GetExecutionFilesRequest
from sllm.rpc.control import Empty
from sllm.rpc.engine import AttachRequest, HostStatus, RecomputeRequest, StopRequest
from sllm.rpc.routes import AcquireRequest, AcquireUpdate, ReportLoadRequest, WatchRoutesRequest

# The tokenizer of the tests: byte b is token b + 3.
SPECIALS = ("<pad>", "<s>", "</s>")
OFFSET = len(SPECIALS)
EOS = 2


def tokens_of(text: str) -> list[int]:
    return [byte + OFFSET for byte in text.encode()]


def text_of(tokens: list[int]) -> str:
    return bytes(token - OFFSET for token in tokens if token >= OFFSET).decode()


class FakeController:
    """A RouteService. `on_acquire` says how an Acquire is answered; the default waits for ever."""

    def __init__(self) -> None:
        self.table = RouteTable(epoch=1, revision=0)
        self.changed = asyncio.Condition()
        self.acquires: list[AcquireRequest] = []
        self.waiting = 0
        self.reports: asyncio.Queue[ReportLoadRequest] = asyncio.Queue()
        self.on_acquire: Callable[[AcquireRequest], AsyncIterator[AcquireUpdate]] = self._wait_for_ever

    async def publish(self, *table: Route, epoch: int = 1) -> None:
        async with self.changed:
            self.table = RouteTable(epoch=epoch, revision=self.table.revision + 1, routes=table)
            self.changed.notify_all()

    async def watch_routes(self, request: WatchRoutesRequest) -> AsyncIterator[RouteTable]:
        sent = 0  # nothing before the first `publish`
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda seen=sent: self.table.revision != seen)
                table = self.table
            sent = table.revision
            yield table

    async def acquire(self, request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        self.acquires.append(request)
        async with self._count(1):
            async for update in self.on_acquire(request):
                yield update

    @asynccontextmanager
    async def _count(self, by: int) -> AsyncIterator[None]:
        async with self.changed:
            self.waiting += by
            self.changed.notify_all()
        try:
            yield
        finally:
            async with self.changed:
                self.waiting -= by
                self.changed.notify_all()

    async def until_waiting(self, count: int) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: self.waiting == count), 10)

    async def report_load(self, request: ReportLoadRequest) -> Empty:
        self.reports.put_nowait(request)
        return Empty()

    async def _wait_for_ever(self, request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        yield AcquireUpdate(phase="loading", progress=0.42)
        await asyncio.Event().wait()


class FakeAgent:
    """An AgentService that only has execution files."""

    def __init__(self) -> None:
        self.files: dict[str, list[ExecutionFile]] = {}
        self.asked = 0

    async def get_execution_files(self, request: GetExecutionFilesRequest) -> AsyncIterator[ExecutionFile]:
        self.asked += 1
        if request.digest not in self.files:
            raise NotFound(f"no checkpoint {request.digest}")
        for file in self.files[request.digest]:
            yield file

    def __getattr__(self, name: str) -> Any:  # the rest of the service is never called
        return lambda request: None


@dataclass
class Running:
    request: TokenRequest
    params: dict[str, Any]
    position: int = 0


@dataclass
class FakeHost:
    """An EngineService. `script` may change each output before it goes out, or raise to break the stream.

    A request one of whose sequences is at a position of `moves` is handed over, with the step that brought it there;
    `skew` is how wrong the positions are that it tells then, and one that is `forgetful` goes on with it all the same.
    While `go` is not set it makes no step, but gives a sign of life every `beat_s`.
    """

    answer: list[int] = field(default_factory=lambda: tokens_of("Hello there."))
    generation: int = 1
    go: asyncio.Event = field(default_factory=asyncio.Event)
    script: Callable[[TokenOutput], TokenOutput] = lambda output: output
    refuse_with: SllmError | None = None
    moves: dict[int, RouteTarget] = field(default_factory=dict)
    skew: int = 0
    forgetful: bool = False
    beat_s: float | None = None
    steps: int = 0
    beats: int = 0
    streams: int = 0
    requests: list[TokenRequest] = field(default_factory=list)
    running: dict[int, Running] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until_running(self, count: int) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: len(self.running) == count), 10)

    async def until_beaten(self, count: int) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: self.beats >= count), 10)

    async def attach(self, request: AttachRequest) -> AsyncIterator[HostStatus]:
        raise NotImplementedError
        yield

    async def stop(self, request: StopRequest) -> Empty:
        return Empty()

    def migrate(self, request: MigrationOrder) -> AsyncIterator[MigrationReport]:
        raise NotImplementedError

    async def recompute(self, request: RecomputeRequest) -> Round:
        raise NotImplementedError

    async def stream(self, frames: AsyncIterator[ClientFrame]) -> AsyncIterator[StepOutputs]:
        self.streams += 1
        running: dict[int, Running] = {}
        self.running = running
        news = asyncio.Event()
        reading = asyncio.create_task(self._read(frames, running, news))
        try:
            while True:
                if reading.done():
                    reading.result()
                if not running:
                    news.clear()
                    waiting = asyncio.create_task(news.wait())
                    await asyncio.wait({reading, waiting}, return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
                    if reading.done():
                        reading.result()
                        return
                    continue
                if not await self._may_step():
                    yield StepOutputs(steps=self.steps)
                    continue
                self.steps += 1
                moves = self._leaving(running)
                outputs = [self.script(self._output(r)) for r in list(running.values())]
                for output in outputs:
                    if output.finish is not None:
                        running.pop(output.stream_id, None)
                moves += self._leaving(running)
                yield StepOutputs(outputs=outputs, moves=moves, timestamp=1.0, steps=self.steps)
                await asyncio.sleep(0)
        finally:
            reading.cancel()
            running.clear()
            async with self.changed:
                self.changed.notify_all()

    async def _may_step(self) -> bool:
        try:
            await asyncio.wait_for(self.go.wait(), self.beat_s)
        except TimeoutError:
            async with self.changed:
                self.beats += 1
                self.changed.notify_all()
            return False
        return True

    def _leaving(self, running: dict[int, Running]) -> list[Moved]:
        targets = {r.request.request_id: self.moves[r.position] for r in running.values() if r.position in self.moves}
        leaving = [r for r in running.values() if r.request.request_id in targets]
        for r in leaving:
            if not self.forgetful:
                del running[r.request.stream_id]
        return [
            Moved(
                stream_id=r.request.stream_id,
                position=r.position + self.skew,
                target=targets[r.request.request_id],
            )
            for r in leaving
        ]

    async def _read(self, frames: AsyncIterator[ClientFrame], running: dict[int, Running], news: asyncio.Event) -> None:
        async for frame in frames:
            match frame:
                case OpenStream():
                    if frame.generation != self.generation:
                        raise StaleGeneration("another generation")
                case TokenRequest():
                    self.requests.append(frame)
                    params = json.loads(frame.sampling_params)
                    running[frame.stream_id] = Running(frame, params, frame.num_output_tokens)
                case AbortRequests():
                    for stream_id in frame.stream_ids:
                        running.pop(stream_id, None)
            news.set()
            async with self.changed:
                self.changed.notify_all()

    def _output(self, r: Running) -> TokenOutput:
        stream_id, position = r.request.stream_id, r.position
        if self.refuse_with is not None:
            finish = Finish(reason=FinishReason.ERROR, error=self.refuse_with)
            return TokenOutput(stream_id=stream_id, position=position, token_ids=[], finish=finish)
        token = [*self.answer, *tokens_of(r.params.get("suffix", "")), EOS][position]
        r.position += 1
        finish = None
        if token == EOS:
            finish = Finish(reason=FinishReason.STOP)
        elif r.position == r.params.get("max_tokens", 16):
            finish = Finish(reason=FinishReason.LENGTH)
        prompt = r.request.token_ids
        first = position == r.request.num_output_tokens
        return TokenOutput(
            stream_id=stream_id,
            position=position,
            token_ids=[token],
            finish=finish,
            logprobs=_logprobs([token], r.params.get("logprobs")),
            prompt_logprobs=_logprobs(prompt[1:], r.params.get("prompt_logprobs")) if first else None,
            prefill=Prefill(num_prompt_tokens=len(prompt), num_cached_tokens=0) if first else None,
        )


def _logprobs(tokens: list[int], candidates: int | None) -> Logprobs | None:
    """Each token first, with logprob -0.5, then `candidates` others."""
    if candidates is None:
        return None
    width = candidates + 1
    return Logprobs(
        num_rows=len(tokens),
        width=width,
        token_ids=[token if i == 0 else OFFSET + ord("a") + i for token in tokens for i in range(width)],
        values=[-0.5 - i for _ in tokens for i in range(width)],
        ranks=[1 for _ in tokens],
    )
