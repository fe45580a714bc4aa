"""A cluster around the gateway under test: controller, agent and engine hosts, in this process, over real gRPC.

The hosts give out the bytes of a text as tokens, one per step, so that an answer can be read off the request. Two kinds
of front end: `PlainFrontEnd` (no vLLM, a few lines) for what the gateway itself does, vLLM's for what clients see.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from sllm.config import GatewayConfig
from sllm.core.checkpoint import ExecutionFile
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.ids import CheckpointName, DeploymentName, NodeName, ReplicaId
from sllm.core.route import Route, RouteTable, RouteTarget
from sllm.core.tokens import (
    AbortRequests,
    ClientFrame,
    Finish,
    FinishReason,
    Logprobs,
    OpenStream,
    Prefill,
    StepOutputs,
    TokenOutput,
    TokenRequest,
)
from sllm.errors import NotFound, SllmError, StaleGeneration
from sllm.gateway.dispatch import Dispatcher
from sllm.gateway.execution_files import ExecutionFiles
from sllm.gateway.frontends import FrontEnd, Message, Receive, Recipe, Send
from sllm.gateway.main import Gateway
from sllm.gateway.remote_engine import Order, RemoteEngine
from sllm.gateway.server import listen
from sllm.rpc import agents, engine, routes
from sllm.rpc.agents import GetExecutionFilesRequest
from sllm.rpc.control import Empty
from sllm.rpc.engine import AttachRequest, HostStatus, StopRequest
from sllm.rpc.routes import AcquireRequest, AcquireUpdate, ReportLoadRequest, WatchRoutesRequest
from sllm.rpc.transport import serve

# The tokenizer of the tests: byte b is token b + 3.
SPECIALS = ("<pad>", "<s>", "</s>")
OFFSET = len(SPECIALS)
EOS = 2


def tokens_of(text: str) -> list[int]:
    return [byte + OFFSET for byte in text.encode()]


def text_of(tokens: list[int]) -> str:
    return bytes(token - OFFSET for token in tokens if token >= OFFSET).decode()


# --- the other processes -------------------------------------------------------------------


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
        yield AcquireUpdate(phase="reading", progress=0.42)
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
    """An EngineService. `script` may change each output before it goes out, or raise to break the stream."""

    answer: list[int] = field(default_factory=lambda: tokens_of("Hello there."))
    generation: int = 1
    go: asyncio.Event = field(default_factory=asyncio.Event)
    script: Callable[[TokenOutput], TokenOutput] = lambda output: output
    refuse_with: SllmError | None = None
    streams: int = 0
    requests: list[TokenRequest] = field(default_factory=list)
    running: dict[int, Running] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until_running(self, count: int) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: len(self.running) == count), 10)

    async def attach(self, request: AttachRequest) -> AsyncIterator[HostStatus]:
        raise NotImplementedError
        yield

    async def stop(self, request: StopRequest) -> Empty:
        return Empty()

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
                await self.go.wait()
                outputs = [self.script(self._output(r)) for r in list(running.values())]
                for output in outputs:
                    if output.finish is not None:
                        running.pop(output.stream_id, None)
                yield StepOutputs(outputs=outputs, timestamp=1.0)
                await asyncio.sleep(0)
        finally:
            reading.cancel()
            running.clear()
            async with self.changed:
                self.changed.notify_all()

    async def _read(self, frames: AsyncIterator[ClientFrame], running: dict[int, Running], news: asyncio.Event) -> None:
        async for frame in frames:
            match frame:
                case OpenStream():
                    if frame.generation != self.generation:
                        raise StaleGeneration("another generation")
                case TokenRequest():
                    self.requests.append(frame)
                    running[frame.stream_id] = Running(frame, json.loads(frame.sampling_params))
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
        token = [*self.answer, EOS][position]
        r.position += 1
        finish = None
        if token == EOS:
            finish = Finish(reason=FinishReason.STOP)
        elif r.position == r.params.get("max_tokens", 16):
            finish = Finish(reason=FinishReason.LENGTH)
        prompt = r.request.token_ids
        return TokenOutput(
            stream_id=stream_id,
            position=position,
            token_ids=[token],
            finish=finish,
            logprobs=_logprobs([token], r.params.get("logprobs")),
            prompt_logprobs=_logprobs(prompt[1:], r.params.get("prompt_logprobs")) if position == 0 else None,
            prefill=Prefill(num_prompt_tokens=len(prompt), num_cached_tokens=0) if position == 0 else None,
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


# --- a front end without vLLM ----------------------------------------------------------------


class PlainFrontEnd:
    """Speaks like vLLM's as far as the gateway can tell: an event per output, in-band errors, [DONE] at the end."""

    def __init__(self, dispatcher: Dispatcher, recipe: Recipe) -> None:
        self.engine = RemoteEngine(dispatcher)
        self.recipe = recipe
        self.healthy = True
        self.closed = False
        self._queues: dict[str, asyncio.Queue[TokenOutput]] = {}
        self._pump = asyncio.create_task(self._run())
        self._count = 0

    async def _run(self) -> None:
        while True:
            step = await self.engine.step()
            for key, output in step.batch:
                if key in self._queues:
                    self._queues[key].put_nowait(output)

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
            async for output in self._outputs(keys, body):
                failed = failed or (output.finish is not None and output.finish.reason is FinishReason.ERROR)
                text += text_of(output.token_ids)
                if stream and not failed:
                    await self._event(send, {"id": scopeless(body), "text": text_of(output.token_ids)})
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

    async def _outputs(self, keys: list[str], body: dict[str, Any]) -> AsyncIterator[TokenOutput]:
        queue: asyncio.Queue[TokenOutput] = asyncio.Queue()
        prompt = tokens_of(body.get("prompt", "?"))
        params = json.dumps({"max_tokens": body.get("max_tokens", 100)}).encode()
        for key in keys:
            self._queues[key] = queue
            self.engine.add(Order(key=key, prompt=prompt, sampling_params=params))
        left = len(keys)
        while left:
            output = await queue.get()
            left -= output.finish is not None
            yield output

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


# --- the cluster -----------------------------------------------------------------------------


def make_route(name: str = "m", *targets: RouteTarget, **changes: Any) -> Route:
    spec = DeploymentSpec(
        name=DeploymentName(name),
        checkpoint=CheckpointName("c"),
        max_replicas=4,
        engine_args=changes.pop("engine_args", {}),
    )
    deployment = Deployment(
        spec=spec,
        revision=changes.pop("revision", 1),
        digest=changes.pop("digest", "sha256-1"),
        created_at=1000.0,
        updated_at=1000.0,
        deleting=changes.pop("deleting", False),
    )
    return replace(Route(deployment=deployment, max_model_len=512, targets=targets), **changes)


class Cluster:
    """Everything a test touches. `http` is a client of the gateway's base URL."""

    def __init__(self) -> None:
        self.controller = FakeController()
        self.agent = FakeAgent()
        self.hosts: dict[str, FakeHost] = {}
        self.servers: dict[str, tuple[grpc.aio.Server, str]] = {}
        self.agent_address = ""
        self.address = ""
        self.gateway: Gateway
        self.builder: Any = None
        self.http: httpx.AsyncClient
        self.stop = asyncio.Event()
        self.serving: asyncio.Task[None]

    async def host(self, name: str = "rep-1", **changes: Any) -> tuple[FakeHost, RouteTarget]:
        """Start an engine host that answers at once; `go` of it can be cleared."""
        capacity, revision = changes.pop("capacity", 8), changes.pop("revision", 1)
        host = FakeHost(**changes)
        host.go.set()
        server, port = await serve([engine.handlers(host)], "127.0.0.1:0", None)
        self.hosts[name], self.servers[name] = host, (server, f"127.0.0.1:{port}")
        return host, self.target(name, capacity=capacity, revision=revision)

    def target(self, name: str, *, capacity: int = 8, revision: int = 1) -> RouteTarget:
        return RouteTarget(
            replica=ReplicaId(name),
            node=NodeName("node-1"),
            address=self.servers[name][1],
            generation=1,
            revision=revision,
            capacity=capacity,
        )

    async def publish(self, *table: Route, epoch: int = 1) -> None:
        """Publish a route table, and return when the gateway has it."""
        taken = asyncio.Event()
        self.gateway._routes.subscribe(taken.set)
        await self.controller.publish(*table, epoch=epoch)
        await asyncio.wait_for(taken.wait(), 10)

    @asynccontextmanager
    async def raw_post(self, path: str, document: object) -> AsyncIterator[asyncio.StreamReader]:
        """Post without an HTTP library, to read the answer exactly as it comes."""
        reader, writer = await asyncio.open_connection(*self.address.split(":"))
        body = json.dumps(document).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        writer.write(f"{head}\r\n".encode() + body)
        async with asyncio.timeout(10):
            yield reader
        writer.close()
        await writer.wait_closed()


Start = Callable[..., Awaitable[Cluster]]


@asynccontextmanager
async def running_cluster(
    folder: Path, make_builder: Callable[[ExecutionFiles, Dispatcher], Any], **settings: Any
) -> AsyncIterator[Cluster]:
    cluster = Cluster()
    controller, port = await serve([routes.handlers(cluster.controller)], "127.0.0.1:0", None)
    agent, agent_port = await serve([agents.handlers(cluster.agent)], "127.0.0.1:0", None)
    cluster.agent_address = f"127.0.0.1:{agent_port}"
    config = GatewayConfig(
        listen="127.0.0.1:0", controller=f"127.0.0.1:{port}", state_dir=folder / "gateway", **settings
    )

    def keep_builder(files: ExecutionFiles, dispatcher: Dispatcher) -> Any:
        cluster.builder = make_builder(files, dispatcher)
        return cluster.builder

    sock = listen(config.listen)
    cluster.address = "{}:{}".format(*sock.getsockname())
    cluster.gateway = Gateway(config, None, keep_builder)
    cluster.serving = asyncio.create_task(cluster.gateway.serve(sock, cluster.stop))
    cluster.http = httpx.AsyncClient(base_url=f"http://{cluster.address}", timeout=20, trust_env=False)
    try:
        yield cluster
    finally:
        await cluster.http.aclose()
        cluster.stop.set()
        await cluster.serving
        for server, _ in cluster.servers.values():
            await server.stop(None)
        await controller.stop(None)
        await agent.stop(None)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A cluster whose gateway has plain front ends, and waits only briefly."""
    async with running_cluster(tmp_path, PlainBuilder, comment_after_s=0.05, comment_every_s=0.02) as running:
        yield running


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights, enough for a front end: configuration, byte tokenizer, chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    by_byte = _byte_alphabet()
    assert set(by_byte) == set(alphabet)
    vocabulary = {name: i for i, name in enumerate([*SPECIALS, *by_byte])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "model_max_length": 512,
                "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            }
        )
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "vocab_size": len(vocabulary),
                "max_position_embeddings": 512,
                "bos_token_id": 1,
                "eos_token_id": EOS,
                "torch_dtype": "float32",
            }
        )
    )
    return folder


def _byte_alphabet() -> list[str]:
    """Return GPT-2's printable stand-in for each byte, in byte order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(stand_ins)) for b in range(256)]


def files_in(folder: Path) -> list[ExecutionFile]:
    return [ExecutionFile(path=p.name, content=p.read_bytes()) for p in sorted(folder.iterdir())]


@pytest.fixture(scope="session")
def vllm_builder() -> Callable[[ExecutionFiles, Dispatcher], Any]:
    """vLLM's front ends; the import is paid once."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sllm.gateway import vllm_frontend

        vllm_frontend.prepare()
    return vllm_frontend.VllmBuilder


@pytest.fixture
async def vllm_cluster(
    tmp_path: Path, model_folder: Path, vllm_builder: Callable[[ExecutionFiles, Dispatcher], Any]
) -> AsyncIterator[Cluster]:
    """A cluster whose gateway has vLLM's front ends; the agent holds the model `sha256-1`."""
    async with running_cluster(tmp_path, vllm_builder, comment_after_s=0.3, comment_every_s=0.02) as running:
        running.agent.files["sha256-1"] = files_in(model_folder)
        yield running


@pytest.fixture
def free_port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def a_route() -> Callable[..., Route]:
    """Makes routes: `a_route(NAME, *TARGETS, revision=…, digest=…, sources=…)`."""
    return make_route
