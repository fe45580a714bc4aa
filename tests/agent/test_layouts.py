"""Which layout a replica starts from, and what becomes of one that an engine host saved. Hosts do as the test says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sllm.core.ids import DeviceId, ReplicaId
from sllm.core.launch import LaunchRecord, WarmReady
from sllm.core.replica import ReplicaState
from sllm.core.runtime_layout import runtime_key
from sllm.linux import start_ticks
from sllm.loader.folder import read_manifest
from sllm.loader.format import PAGE_BYTES, Tensor
from sllm.loader.store import SsdStore
from sllm.loader.writing import CheckpointWriter

MakeSpec = Callable[..., Any]
SECOND = ReplicaId("rep-2")


def saving(node: Any) -> Any:
    """Return the node, with an engine that can save its parameters."""
    node.warm.about = WarmReady(engine="vllm", version="1", seconds=0.0)
    return node


@pytest.fixture
async def node(make_node: Callable[..., Any]) -> Any:
    return saving(make_node(devices=2))


def write_layout(host: Any, size_bytes: int = PAGE_BYTES, **changes: str) -> None:
    """Write what an engine host saves; `changes` falsify its key."""
    launch = host.launch
    key = runtime_key(
        launch.spec, engine="vllm", version="1", device_kind=launch.device_kind, world_size=1, rank=launch.rank
    )
    with CheckpointWriter(Path(launch.save_runtime), [size_bytes]) as writer:
        with writer.partition() as partition:
            partition.write(bytes(size_bytes))
        tensors = {"fused": Tensor(0, 0, size_bytes, "uint8", (size_bytes,), (1,))}
        writer.commit(tensors, layout="runtime", key={**key, **changes})


async def start(node: Any, spec: Any) -> Any:
    """Start a replica and return its host."""
    count = len(node.warm.hosts) + 1
    node.local.replicas.start(spec)
    return await node.until_host(count)


async def start_and_save(node: Any, spec: Any, size_bytes: int = PAGE_BYTES) -> Any:
    host = await start(node, spec)
    host.become_ready()
    write_layout(host, size_bytes)
    host.say(runtime_saved=True)
    await node.until(node.local.store.runtimes)
    await node.until(lambda: len(node.reading.opened) == 2)  # it is read into memory for the next start
    return host


def second(make_spec: MakeSpec, digest: str, **changes: Any) -> Any:
    return make_spec(digest, id=SECOND, devices=(DeviceId("fake-1"),), **changes)


async def test_the_first_start_is_asked_to_save_and_the_next_uses_what_it_saved(
    node: Any, make_spec: MakeSpec, model: Path
) -> None:
    digest = await node.add(model)
    first = await start_and_save(node, make_spec(digest))
    assert first.launch.grant.digest == digest
    host = await start(node, second(make_spec, digest))
    assert host.launch.weights_dir == first.launch.save_runtime
    assert host.launch.grant.size_bytes == PAGE_BYTES
    assert host.launch.execution_dir == first.launch.execution_dir
    assert host.launch.save_runtime == ""


async def test_only_one_start_at_a_time_is_asked_to_save(node: Any, make_spec: MakeSpec, model: Path) -> None:
    digest = await node.add(model)
    first = await start(node, make_spec(digest))
    assert first.launch.save_runtime
    assert (await start(node, second(make_spec, digest))).launch.save_runtime == ""
    first.die("signal 9")
    node.local.replicas.stop(SECOND, 1, 0.0)
    await node.until(lambda: not node.local.replicas.leases.holders)
    third = make_spec(digest, id=ReplicaId("rep-3"))
    assert (await start(node, third)).launch.save_runtime == first.launch.save_runtime


async def test_a_deployment_with_another_dtype_does_not_use_it(node: Any, make_spec: MakeSpec, model: Path) -> None:
    digest = await node.add(model)
    first = await start_and_save(node, make_spec(digest))
    host = await start(node, second(make_spec, digest, engine_args={"dtype": "float32"}))
    assert host.launch.grant.digest == digest
    assert host.launch.save_runtime not in ("", first.launch.save_runtime)


async def test_a_quantised_deployment_saves_nothing(node: Any, make_spec: MakeSpec, model: Path) -> None:
    host = await start(node, make_spec(await node.add(model), engine_args={"quantization": "fp8"}))
    assert host.launch.save_runtime == ""


CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128, "vocab_size": 100}


@pytest.mark.parametrize(
    "config",
    [{**CONFIG, "architectures": ["OddForCausalLM"]}, {**CONFIG, "quantization_config": {"quant_method": "fp8"}}],
    ids=["unknown-architecture", "quantised"],
)
async def test_a_start_that_will_save_nothing_takes_no_room_from_what_others_saved(
    make_node: Callable[..., Any], make_spec: MakeSpec, make_model: Callable[..., Path], config: dict[str, Any]
) -> None:
    layout_bytes, slack_bytes = 4 << 20, 64 << 10
    node = saving(make_node(devices=2, ssd_bytes=3 * (4 << 20) + slack_bytes))
    await start_and_save(node, make_spec(await node.add(make_model("known"), "known")), layout_bytes)
    model = make_model("odd")
    (model / "config.json").write_text(json.dumps(config))
    host = await start(node, second(make_spec, await node.add(model, "odd")))
    assert host.launch.save_runtime == ""
    assert len(node.local.store.runtimes()) == 1


async def test_an_engine_that_cannot_save_is_not_asked_to(node: Any, make_spec: MakeSpec, model: Path) -> None:
    node.warm.about = WarmReady(engine="fake", version="1", seconds=0.0)
    assert (await start(node, make_spec(await node.add(model)))).launch.save_runtime == ""


@pytest.mark.parametrize("reason", ["STALE_LAYOUT", "CHUNK_CORRUPT"])
async def test_a_start_from_a_layout_that_is_of_no_use_begins_again_from_the_original(
    node: Any, make_spec: MakeSpec, model: Path, reason: str
) -> None:
    digest = await node.add(model)
    await start_and_save(node, make_spec(digest))
    refusing = await start(node, second(make_spec, digest))
    refusing.say(state=ReplicaState.FAILED, error="of no use", error_reason=reason)
    await node.until(lambda: len(node.warm.hosts) == 3)
    host = node.warm.hosts[-1]
    assert host.launch.grant.digest == digest
    assert node.local.store.runtimes() == ()
    host.become_ready()
    await node.until(lambda: node.state(SECOND) == "ready")
    assert node.status(SECOND).error == ""


async def test_it_begins_again_once_only(node: Any, make_spec: MakeSpec, model: Path) -> None:
    digest = await node.add(model)
    await start_and_save(node, make_spec(digest))
    (await start(node, second(make_spec, digest))).say(
        state=ReplicaState.FAILED, error="of no use", error_reason="STALE_LAYOUT"
    )
    await node.until(lambda: len(node.warm.hosts) == 3)
    node.warm.hosts[-1].say(state=ReplicaState.FAILED, error="no tensor", error_reason="INVALID_CHECKPOINT")
    await node.until(lambda: node.state(SECOND) == "failed")
    assert node.status(SECOND).error == "no tensor"


async def test_what_was_saved_for_something_else_is_not_taken_in(
    node: Any, make_spec: MakeSpec, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = await node.add(model)
    host = await start(node, make_spec(digest))
    host.become_ready()
    write_layout(host, engine_version="0")
    host.say(runtime_saved=True, running=1)
    await node.until(lambda: node.status().running == 1)
    next_host = await start(node, second(make_spec, digest))
    assert next_host.launch.grant.digest == digest
    assert node.local.store.runtimes() == ()
    assert SsdStore(node.local.store.root).runtimes() == ()  # nor by the next agent
    assert not Path(host.launch.save_runtime).exists()


async def test_what_was_saved_is_taken_in_though_the_warm_process_is_another_version_by_then(
    node: Any, make_spec: MakeSpec, model: Path
) -> None:
    host = await start(node, make_spec(await node.add(model)))
    host.become_ready()
    node.warm.about = None  # and not ready, which is nothing to wait for
    write_layout(host)
    host.say(runtime_saved=True)
    await node.until(node.local.store.runtimes)
    assert str(node.local.store.runtimes()[0].folder) == host.launch.save_runtime


async def test_what_a_host_saves_after_a_restart_of_its_agent_is_taken_in(
    node: Any, make_node: Callable[..., Any], make_spec: MakeSpec, model: Path
) -> None:
    spec = make_spec(await node.add(model))
    host = await start(node, spec)
    host.become_ready()
    async with living_process() as pid:
        path = node.local.records.path(spec.id)
        record = replace(LaunchRecord.from_json(path.read_text()), pid=pid, start_ticks=start_ticks(pid))
        path.write_text(record.to_json())
        successor = saving(make_node(devices=2))
        await successor.local.replicas.adopt()
        write_layout(host)
        host.say(runtime_saved=True)
        await successor.until(successor.local.store.runtimes)


@asynccontextmanager
async def living_process() -> AsyncIterator[int]:
    """Give the pid of a process that stands for a host whose parent is gone, until its agent ends it."""
    process = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
    try:
        yield process.pid
    finally:
        process.kill()
        await process.wait()


ADOPT = """
import json, sys
from pathlib import Path
from sllm.loader.store import SsdStore
SsdStore(Path(sys.argv[1])).adopt_runtime(json.loads(sys.argv[2]))
"""


async def test_an_agent_that_dies_as_it_takes_a_layout_in_has_it_after_a_restart(
    node: Any, make_spec: MakeSpec, model: Path
) -> None:
    host = await start(node, make_spec(await node.add(model)))
    write_layout(host)
    folder, root = Path(host.launch.save_runtime), node.local.store.root
    dying = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ADOPT, root, json.dumps(dict(read_manifest(folder).key))),
        env={**os.environ, "SLLM_FAILPOINT": "adopt-runtime"},
    )
    assert await dying.wait() == -signal.SIGKILL
    assert [layout.folder for layout in SsdStore(root).runtimes()] == [folder]
