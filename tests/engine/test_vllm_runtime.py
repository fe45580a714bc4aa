"""The runtime layout with the real vLLM: saved by one engine host, used in place by the next, refused when stale."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sllm.core.launch import Launch
from sllm.core.replica import ReplicaState, StartPhase
from sllm.core.tokens import OpenStream, TokenRequest
from sllm.engine.weights import open_weights
from sllm.errors import StaleLayout
from sllm.loader import load, save
from sllm.rpc.engine import AttachRequest, EngineClient, HostStatus

pytestmark = [pytest.mark.vllm, pytest.mark.e2e, pytest.mark.timeout(300)]

Make = Callable[..., Any]
PROMPT = [5, 17, 30, 44, 90, 100, 101, 102]
FLOAT32 = {"dtype": "float32"}


@dataclass
class Forked:
    """An engine host, and a client of it."""

    client: EngineClient
    launch: Launch
    pid: int
    pool: Any

    async def until(self, wanted: Callable[[HostStatus], bool]) -> HostStatus:
        async with asyncio.timeout(120), aclosing(self.client.attach(AttachRequest(nonce=self.launch.nonce))) as all_:
            async for status in all_:
                if wanted(status):
                    return status
        raise AssertionError("the host never got there")

    async def settled(self) -> HostStatus:
        return await self.until(lambda status: status.state is not ReplicaState.STARTING)


@pytest.fixture(scope="module")
def warm_vllm(start_warm: Make) -> Any:
    return start_warm("vllm")


@pytest.fixture
async def fork(warm_vllm: Any, make_launch: Make, tiny_weights: Path) -> AsyncIterator[Make]:
    """Return a coroutine function that forks a host of the tiny model; keywords are its launch's."""
    running: list[Forked] = []

    async def start(weights: Path = tiny_weights, **changes: Any) -> Forked:
        values = {"engine_args": FLOAT32, "execution_dir": str(tiny_weights), "weights": weights, **changes}
        launch = make_launch(**values)
        record = await warm_vllm.fork(launch)
        client = EngineClient(record.address, None, peer="engine host")
        running.append(Forked(client, launch, record.pid, warm_vllm.pools[launch.nonce]))
        return running[-1]

    yield start
    for host in running:
        await host.client.close()
        if host.pid in warm_vllm.pids:
            os.kill(host.pid, signal.SIGKILL)
            await warm_vllm.exited(host.pid)


@pytest.fixture
async def layout(fork: Make, tmp_path: Path) -> tuple[Path, Forked]:
    """A runtime layout, and the host that saved it."""
    host = await fork(save_runtime=str(tmp_path / "saved"))
    status = await host.until(lambda status: status.runtime_saved or status.state is ReplicaState.FAILED)
    assert status.state is ReplicaState.READY, status.error
    return tmp_path / "saved", host


async def answers(vllm: SimpleNamespace, host: Forked, collect: Make) -> list[list[int]]:
    """Return a greedy answer and a seeded one."""
    stream = host.client.open_stream(
        OpenStream(protocol_version=1, gateway="g", generation=host.launch.spec.generation)
    )
    params = vllm.sampling.SamplingParams
    asked = [
        params(temperature=0.0, max_tokens=48, ignore_eos=True),
        params(temperature=1.0, seed=7, max_tokens=48, ignore_eos=True),
    ]
    for number, each in enumerate(asked):
        request = TokenRequest(
            stream_id=number,
            request_id=f"req-{number}",  # type: ignore[arg-type]
            token_ids=PROMPT,
            sampling_params=msgspec.json.encode(each),
        )
        stream.send(request)
    outputs = await collect(stream, 0, 1)
    await stream.close()
    return [[token for output in outputs[number] for token in output.token_ids] for number in (0, 1)]


def pool_kib(pid: int) -> dict[str, int]:
    """Return what smaps says of a process' mappings of the pool, in KiB."""
    sums: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = "memfd:pool" in line
        elif inside and rest[-1:] == ["kB"]:
            sums[name[:-1]] = sums.get(name[:-1], 0) + int(rest[0])
    return sums


async def test_answers_are_the_same_token_by_token_from_either_layout(
    vllm: SimpleNamespace, fork: Make, layout: tuple[Path, Forked], collect: Make
) -> None:
    folder, first = layout
    second = await fork(folder)
    status = await second.settled()
    assert status.state is ReplicaState.READY, status.error
    assert await answers(vllm, second, collect) == await answers(vllm, first, collect)


async def test_an_engine_uses_saved_parameters_where_they_lie(
    vllm: SimpleNamespace, fork: Make, layout: tuple[Path, Forked], collect: Make
) -> None:
    folder, first = layout
    host = await fork(folder)
    await host.settled()
    await answers(vllm, host, collect)
    used = pool_kib(host.pid)
    assert used["Rss"] * 1024 >= host.launch.grant.size_bytes
    assert used["Anonymous"] == 0  # no page was written to: in a pool of huge ones there might be none for its copy
    assert host.pool.is_leased
    assert pool_kib(first.pid) == {}  # it copied them, and let go


async def test_a_host_that_dies_as_it_saves_leaves_no_layout(
    warm: Make, make_launch: Make, tiny_weights: Path, tmp_path: Path
) -> None:
    process, folder = warm("vllm", SLLM_FAILPOINT="write-manifest"), tmp_path / "saved"
    launch = make_launch(
        weights=tiny_weights, execution_dir=str(tiny_weights), engine_args=FLOAT32, save_runtime=str(folder)
    )
    pid = process.ask(launch)["pid"]
    assert await process.exited(pid) == -signal.SIGKILL
    assert not folder.exists()
    assert not process.pools[launch.nonce].is_leased


async def test_another_dtype_is_another_layout(fork: Make, layout: tuple[Path, Forked]) -> None:
    host = await fork(layout[0], engine_args={"dtype": "bfloat16"})
    status = await host.settled()
    assert (status.state, status.error_reason) == (ReplicaState.FAILED, "STALE_LAYOUT")
    assert "arg.dtype" in status.error


async def test_a_layout_with_another_shape_is_stale_whatever_its_key_says(
    fork: Make, layout: tuple[Path, Forked], tmp_path: Path
) -> None:
    from sllm.loader.format import parse

    manifest = parse((layout[0] / "manifest.json").read_bytes())
    tensors = load(layout[0])
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1]
    save(tensors, tmp_path / "odd", layout="runtime", key=manifest.key)
    status = await (await fork(tmp_path / "odd")).settled()
    assert (status.state, status.error_reason) == (ReplicaState.FAILED, "STALE_LAYOUT")
    assert name in status.error


async def test_an_engine_is_built_while_its_weights_come(
    vllm: SimpleNamespace, fork: Make, layout: tuple[Path, Forked], collect: Make, tiny_weights: Path
) -> None:
    for folder in (layout[0], tiny_weights):
        host = await fork(folder, ready=0)
        await host.until(lambda status: status.phase is StartPhase.LOADING)
        host.pool.read_to(1)
        status = await host.settled()
        assert status.state is ReplicaState.READY, status.error
        assert status.phases_s.keys() == {"loading", "building"}
        assert await answers(vllm, host, collect) == await answers(vllm, layout[1], collect)


@pytest.mark.parametrize("from_runtime", [True, False])
async def test_a_load_that_fails_fails_vllms_start_with_its_reason(
    fork: Make, layout: tuple[Path, Forked], tiny_weights: Path, from_runtime: bool
) -> None:
    host = await fork(layout[0] if from_runtime else tiny_weights, ready=0)
    host.pool.say({"error": "CHECKPOINT_UNREADABLE", "message": "the disk does not give chunk 0"})
    status = await host.settled()
    assert (status.error_reason, status.error) == ("CHECKPOINT_UNREADABLE", "the disk does not give chunk 0")


def test_large_parameters_become_views_of_the_mapping(
    vllm: SimpleNamespace, make_launch: Make, make_pool: Make, tmp_path: Path
) -> None:
    import torch

    from sllm.engine import vllm_runtime

    torch.manual_seed(0)
    saved, model = torch.nn.Linear(300, 200), torch.nn.Linear(300, 200)
    launch = make_launch(weights=write_layout(vllm_runtime, make_launch, saved, tmp_path / "a"))
    weights = open_weights(launch, *make_pool(launch).give())
    weights.feed.follow(lambda share: None)
    vllm_runtime.use(model, weights, launch, torch.device("cpu"))
    assert torch.equal(model.weight, saved.weight)
    assert weights.memory is not None
    begin, end = weights.memory.address, weights.memory.address + weights.memory.size_bytes
    assert begin <= model.weight.data_ptr() < end
    assert not begin <= model.bias.data_ptr() < end  # small: it may be written to
    assert torch.equal(model.bias, saved.bias)
    with pytest.raises(StaleLayout, match="checkpoint"):
        spec = replace(launch.spec, digest="sha256:1")
        vllm_runtime.use(model, weights, replace(launch, spec=spec), torch.device("cpu"))
    with pytest.raises(StaleLayout, match="more"):
        model.more = torch.nn.Parameter(torch.zeros(1))
        vllm_runtime.use(model, weights, launch, torch.device("cpu"))


def write_layout(vllm_runtime: Any, make_launch: Make, model: Any, folder: Path) -> Path:
    save(model.state_dict(), folder, layout="runtime", key=vllm_runtime.key_of(make_launch()))
    return folder


@pytest.mark.parametrize(
    ("folder", "quantization", "architecture"),
    [("", None, "LlamaForCausalLM"), ("/x", "fp8", "LlamaForCausalLM"), ("/x", None, "OddForCausalLM")],
    ids=["not-asked", "quantised", "not-known-to-be-all-in-its-parameters"],
)
def test_some_models_are_not_saved(
    vllm: SimpleNamespace, make_launch: Make, folder: str, quantization: str | None, architecture: str
) -> None:
    import torch

    from sllm.engine import vllm_runtime

    config = SimpleNamespace(quantization=quantization, architectures=[architecture])
    assert vllm_runtime.to_save(torch.nn.Linear(2, 2), make_launch(save_runtime=folder), config) is None


def test_what_is_saved_is_as_it_was_loaded(vllm: SimpleNamespace, make_launch: Make) -> None:
    import torch

    from sllm.engine import vllm_runtime

    config = SimpleNamespace(quantization=None, architectures=["LlamaForCausalLM"])
    model = torch.nn.Linear(2, 2)
    model.register_buffer("scale", torch.tensor(3.0))
    kept = vllm_runtime.to_save(model, make_launch(save_runtime="/x"), config)
    assert kept is not None
    model.scale.fill_(1.0)  # as vLLM's attention layers do
    assert kept["scale"] == 3.0
