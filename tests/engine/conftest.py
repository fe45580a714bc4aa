"""Shared by the engine tests: launches, a host served over real gRPC in this process, a warm process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine.following import target_of

from sllm.agent.records import Records
from sllm.core.grant import POOL_BLOCK_BYTES, Extent, Grant
from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, ReplicaId, RequestId
from sllm.core.launch import Launch, LaunchRecord
from sllm.core.replica import ReplicaSpec, ReplicaState
from sllm.core.route import RouteTarget
from sllm.core.tokens import PROTOCOL_VERSION, OpenStream, TokenOutput, TokenRequest
from sllm.engine.fake import FakeSettings, build_fake
from sllm.engine.host import Host
from sllm.loader import convert
from sllm.loader import format as checkpoint_format
from sllm.loader.format import Tensor
from sllm.loader.writing import CheckpointWriter
from sllm.rpc import transport
from sllm.rpc.engine import AttachRequest, EngineClient, HostStatus, TokenStream, handlers

GENERATION = 7
_PR_SET_CHILD_SUBREAPER = 36
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
CHUNK_BYTES = 1 << 20


# --- weights -------------------------------------------------------------------------------


def write_weights(folder: Path, size_bytes: int = 2 * CHUNK_BYTES + 8192) -> Path:
    """Write a checkpoint of one tensor, in chunks of CHUNK_BYTES whose bytes differ."""
    content = b"".join(bytes([1 + n]) * CHUNK_BYTES for n in range(-(-size_bytes // CHUNK_BYTES)))[:size_bytes]
    with CheckpointWriter(folder, [size_bytes]) as writer:
        with writer.partition() as partition:
            partition.write(content)
        writer.commit({"w": Tensor(0, 0, size_bytes, "uint8", (size_bytes,), (1,))})
    return folder


def grant_of(folder: Path, *, ready: int | None = None, slots: int | None = None) -> Grant:
    """Return a grant of a checkpoint's only partition, in extents that do not follow each other in the pool."""
    manifest = checkpoint_format.parse((folder / "manifest.json").read_bytes())
    size_bytes, chunk_bytes = manifest.partitions[0].size_bytes, manifest.chunk_bytes
    chunks = -(-size_bytes // chunk_bytes)
    slots = min(chunks, chunks if slots is None else slots)
    pieces = -(-slots * chunk_bytes // POOL_BLOCK_BYTES)
    return Grant(
        digest=manifest.digest,
        partition=0,
        generation=1,
        size_bytes=size_bytes,
        chunk_bytes=chunk_bytes,
        extents=tuple(Extent(2 * n * POOL_BLOCK_BYTES, POOL_BLOCK_BYTES) for n in reversed(range(pieces))),
        slots=slots,
        ready_chunks=min(slots, chunks if ready is None else ready) if slots == chunks else 0,
    )


class PoolInTest:
    """Plays the store process for one launch: holds the memory, and reads when the test says so."""

    def __init__(self, launch: Launch) -> None:
        self.grant = launch.grant
        partition = Path(launch.weights_dir) / "partition-000.bin"
        self.content = partition.read_bytes() if partition.exists() else b""
        self.fd = os.memfd_create("pool", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, max((e.offset + e.size_bytes for e in self.grant.extents), default=0))
        self.lease_fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        if self.grant.extents:
            locked = self.grant.extents[0]
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, *locked, 0)
            fcntl.fcntl(self.lease_fd, _F_OFD_SETLK, lock)
        self.feed, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.feed_fd = theirs.detach()
        self.put(0, self.grant.ready_chunks)

    @property
    def is_leased(self) -> bool:
        """Whether the kernel knows of anybody who may read the grant's first extent."""
        offset, size_bytes = self.grant.extents[0]
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, size_bytes, 0)
        kind: int = struct.unpack("hhqqi4x", fcntl.fcntl(self.fd, _F_OFD_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK

    def put(self, first: int, end: int) -> None:
        """Read chunks into their places."""
        for chunk in range(first, end):
            start = chunk * self.grant.chunk_bytes
            piece, within = divmod(chunk % self.grant.slots * self.grant.chunk_bytes, POOL_BLOCK_BYTES)
            content = self.content[start : start + self.grant.chunk_bytes]
            os.pwrite(self.fd, content, self.grant.extents[piece].offset + within)

    def read_to(self, chunks: int) -> None:
        """Put everything before a chunk, and say so."""
        self.put(0, chunks)
        self.say({"ready": chunks})

    def say(self, message: dict[str, Any]) -> None:
        self.feed.send(json.dumps(message).encode())

    def give(self) -> tuple[int, int]:
        """Return descriptors of lease and feed for somebody who takes them over; this end keeps none."""
        given = self.lease_fd, self.feed_fd
        self.lease_fd = self.feed_fd = -1
        return given

    def close(self) -> None:
        self.feed.close()
        for fd in (self.fd, self.lease_fd, self.feed_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.lease_fd = self.feed_fd = -1


@pytest.fixture(name="write_weights")
def _write_weights() -> Callable[..., Path]:
    return write_weights


@pytest.fixture
def make_pool() -> Iterator[Callable[[Launch], PoolInTest]]:
    """Return a function that makes the pool of a launch."""
    made: list[PoolInTest] = []

    def make(launch: Launch) -> PoolInTest:
        made.append(PoolInTest(launch))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def _launch(tmp_path: Path, **changes: Any) -> Launch:
    spec = ReplicaSpec(
        id=ReplicaId("rep-00000000000000"),
        deployment=DeploymentName("story"),
        revision=1,
        generation=GENERATION,
        checkpoint=CheckpointName("story"),
        digest="sha256:0",
        devices=(DeviceId("cpu-0"),),
        capacity=4,
        max_model_len=512,
    )
    names = {f for f in ReplicaSpec.__dataclass_fields__ if f in changes}
    spec = replace(spec, **{name: changes.pop(name) for name in names})
    weights = changes.pop("weights", None) or _default_weights(tmp_path)
    values: dict[str, Any] = {
        "nonce": os.urandom(8).hex(),
        "grant": grant_of(weights, ready=changes.pop("ready", None), slots=changes.pop("slots", None)),
        "weights_dir": str(weights),
        "execution_dir": str(tmp_path / "no-checkpoint"),
        "record_path": str(tmp_path / f"{spec.id}.json"),
        "scratch_dir": str(tmp_path / "scratch"),
        "bind_host": "127.0.0.1",
        "device_kind": "cpu",
        "device_ids": (DeviceId("cpu-0"),),
        "threads": 1,
        "memory_bytes": 0,
        "kv_cache_bytes": 32 << 20,
        "grace_s": 60.0,
        **changes,
    }
    return Launch(spec=spec, **values)


def _default_weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    return folder if folder.exists() else write_weights(folder)


@pytest.fixture
def make_launch(tmp_path: Path) -> Callable[..., Launch]:
    """Return a function that makes a Launch; keywords replace fields of it or of its spec. `weights` is a checkpoint
    folder, of which `ready` chunks are in memory (default: all), or which streams through a ring of `slots`."""
    return lambda **changes: _launch(tmp_path, **changes)


@pytest.fixture
def request_of() -> Callable[..., TokenRequest]:
    """Return a function that makes a TokenRequest; keywords are sampling parameters."""

    def make(stream_id: int, token_ids: list[int], *, num_output_tokens: int = 0, **params: Any) -> TokenRequest:
        return TokenRequest(
            stream_id=stream_id,
            request_id=RequestId(f"req-{stream_id}"),
            token_ids=token_ids,
            num_output_tokens=num_output_tokens,
            sampling_params=json.dumps(params).encode(),
        )

    return make


# --- a host in this process ----------------------------------------------------------------


class StepClock:
    """The engine's clock as a turnstile: each sleep waits for `let` to let it through, unless it is `open`."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._open = False

    def sleep(self, seconds: float) -> None:
        if not self._open:
            self._permits.acquire()

    def let(self, sleeps: int) -> None:
        self._permits.release(sleeps)

    def open(self) -> None:
        self._open = True
        self._permits.release(1000)


@dataclass
class Served:
    """A host, a client of it, and ways to wait for what happens."""

    host: Host
    client: EngineClient
    launch: Launch
    clock: StepClock
    streams: list[TokenStream] = field(default_factory=list)

    @property
    def target(self) -> RouteTarget:
        """What a gateway knows of it."""
        return target_of(self.launch.spec, self.client.address)

    def opening(self, **changes: Any) -> OpenStream:
        first = OpenStream(protocol_version=PROTOCOL_VERSION, gateway="gateway", generation=GENERATION)
        return replace(first, **changes)

    def open(self, **changes: Any) -> TokenStream:
        stream = self.client.open_stream(self.opening(**changes))
        self.streams.append(stream)
        return stream

    async def until(self, state: ReplicaState) -> HostStatus:
        return await self.until_status(lambda status: status.state is state)

    async def until_status(self, wanted: Callable[[HostStatus], bool]) -> HostStatus:
        async with aclosing(self.client.attach(AttachRequest(nonce=self.launch.nonce))) as statuses:
            async for status in statuses:
                if wanted(status):
                    return status
        raise AssertionError("the host never got there")


@pytest.fixture
async def serve(make_launch: Callable[..., Launch]) -> AsyncIterator[Callable[..., Any]]:
    """Return a coroutine function that serves a host with the fake engine; keywords are a launch's and `fake`."""
    async with AsyncExitStack() as stack:

        async def start(
            *, fake: FakeSettings | None = None, gated: bool = False, beat_s: float = 1.0, **changes: Any
        ) -> Served:
            launch, clock, settings = make_launch(**changes), StepClock(), fake or FakeSettings()
            if not gated:
                clock.open()
            host = Host(
                launch,
                lambda hooks: build_fake(launch, hooks, settings, clock),
                memory_bytes=lambda: 42,
                load_every_s=0.01,
                beat_s=beat_s,
            )
            server, port = await transport.serve([handlers(host)], "127.0.0.1:0", None)
            client = EngineClient(f"127.0.0.1:{port}", None, peer="engine host")
            served = Served(host, client, launch, clock)
            stack.push_async_callback(_end, served, server)
            host.start()
            return served

        yield start


async def _end(served: Served, server: Any) -> None:
    served.clock.open()
    for stream in served.streams:
        await stream.close()
    await served.client.close()
    served.host.drain(0)
    await server.stop(0)
    await served.host.close(5)


@pytest.fixture
def collect() -> Callable[..., Any]:
    """Return a coroutine function that reads a token stream until some requests are finished: outputs by stream id."""

    async def read(stream: TokenStream, *stream_ids: int) -> dict[int, list[TokenOutput]]:
        outputs: dict[int, list[TokenOutput]] = {stream_id: [] for stream_id in stream_ids}
        waiting = set(stream_ids)
        async with aclosing(stream.steps()) as steps:
            async for step in steps:
                for output in step.outputs:
                    outputs.setdefault(output.stream_id, []).append(output)
                    if output.finish is not None:
                        waiting.discard(output.stream_id)
                if not waiting:
                    break
        return outputs

    return read


@pytest.fixture(scope="session")
def settled() -> Callable[..., Any]:
    """Return a coroutine function that attaches until a host is ready or has failed."""

    async def wait(client: EngineClient, nonce: str) -> HostStatus:
        async with aclosing(client.attach(AttachRequest(nonce=nonce))) as statuses:
            async for status in statuses:
                if status.state is not ReplicaState.STARTING:
                    return status
        raise AssertionError("the host ended")

    return wait


# --- a warm process ------------------------------------------------------------------------


class WarmProcess:
    """Plays the agent: spawns `sllm.engine.warm`, asks it for forks, reaps its hosts."""

    def __init__(self, engine: str, env: dict[str, str], log: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sllm.engine.warm", "--fd", str(theirs.fileno()), "--engine", engine],
                pass_fds=[theirs.fileno()],
                stdout=out,
                stderr=out,
                env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            )
        theirs.close()
        self.control = ours
        self.log = log
        self.pids: list[int] = []
        self.pools: dict[str, PoolInTest] = {}
        packet = self.control.recv(1 << 20)
        assert packet, f"the warm process ended: {log.read_text()}"
        self.ready = json.loads(packet)["ready"]

    def ask(self, launch: Launch) -> dict[str, Any]:
        """Ask for a fork and return the answer; `pools` has the weights, by nonce."""
        pool = self.pools[launch.nonce] = PoolInTest(launch)
        fds = [_memfd(launch.to_json().encode()), *pool.give(), os.open(self.log, os.O_WRONLY | os.O_APPEND)]
        socket.send_fds(self.control, [json.dumps({"fork": launch.nonce}).encode()], fds)
        for fd in fds:
            os.close(fd)
        answer: dict[str, Any] = json.loads(self.control.recv(1 << 16))
        if "pid" in answer:
            self.pids.append(answer["pid"])
        return answer

    async def fork(self, launch: Launch) -> LaunchRecord:
        """Fork a host and return its record once it listens."""
        answer = self.ask(launch)
        assert answer.get("forked") == launch.nonce, answer
        records = Records(Path(launch.record_path).parent)
        try:
            async with asyncio.timeout(60):
                return await records.wait_for(launch.spec.id, launch.nonce)
        except TimeoutError:
            raise AssertionError(self.log.read_text()) from None
        finally:
            records.close()

    async def exited(self, pid: int) -> int:
        """Wait for a host to end and return its exit status (negative: the signal)."""
        pidfd = os.pidfd_open(pid)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        await ended.wait()
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        self.pids.remove(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        while self.pids:
            pid = self.pids.pop()
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self.control.close()
        self.process.wait(30)
        for pool in self.pools.values():
            pool.close()


def _memfd(content: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.pwrite(fd, content, 0)
    return fd


@pytest.fixture(scope="session")
def subreaper() -> Iterator[None]:
    """Make this process the parent of orphans below it, as an agent is."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def start_warm(subreaper: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., WarmProcess]]:
    """Return a function that starts a warm process for the whole module; keywords are its environment."""
    started: list[WarmProcess] = []

    def start(engine: str = "fake", **env: str) -> WarmProcess:
        started.append(WarmProcess(engine, env, tmp_path_factory.mktemp("warm") / "engine.log"))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def warm(start_warm: Callable[..., WarmProcess]) -> Iterator[Callable[..., WarmProcess]]:
    """As `start_warm`, for one test."""
    started: list[WarmProcess] = []

    def start(engine: str = "fake", **env: str) -> WarmProcess:
        started.append(start_warm(engine, **env))
        return started[-1]

    yield start
    for process in started:
        process.close()


# --- vLLM ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """vLLM sets variables, LD_PRELOAD among them, that later children of this process must not inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    with _same_environment():
        yield


@pytest.fixture(scope="session")
def vllm() -> SimpleNamespace:
    """Import vLLM and our modules that need it into this process; warnings of theirs are not ours."""
    pytest.importorskip("vllm")
    with warnings.catch_warnings(), _same_environment():
        warnings.simplefilter("ignore")
        import torch  # noqa: F401
        from vllm import sampling_params
        from vllm.v1 import engine, outputs
        from vllm.v1.metrics import stats

        from sllm.engine import vllm_args, vllm_setup, vllm_tokens

        vllm_args.parser()
    return SimpleNamespace(
        sampling=sampling_params,
        engine_types=engine,
        outputs=outputs,
        stats=stats,
        args=vllm_args,
        setup=vllm_setup,
        tokens=vllm_tokens,
    )


@pytest.fixture(scope="session")
def tiny_weights(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a checkpoint."""
    folder = tmp_path_factory.mktemp("tiny-weights") / "tiny"
    convert(tiny_llama, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32 with a tokenizer of single bytes."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("tiny-llama")
    with warnings.catch_warnings(), _same_environment():
        warnings.simplefilter("ignore")
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        special = {"<pad>": 0, "<s>": 1, "</s>": 2}
        letters = {letter: 3 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab={**special, **letters}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        ).save_pretrained(folder)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(special) + len(letters),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder
