"""Which layout a replica starts from, and what becomes of one that an engine host saved. Hosts do as the test says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.core.ids import DeviceId, ReplicaId
from sllm.core.launch import WarmReady
from sllm.core.replica import ReplicaState
from sllm.core.runtime_layout import runtime_key
from sllm.loader.format import PAGE_BYTES, Tensor
from sllm.loader.writing import CheckpointWriter

MakeSpec = Callable[..., Any]
SECOND = ReplicaId("rep-2")


@pytest.fixture
async def node(make_node: Callable[..., Any]) -> Any:
    """A node whose engine can save its parameters."""
    made = make_node(devices=2)
    made.warm.about = WarmReady(engine="vllm", version="1", seconds=0.0)
    return made


def write_layout(host: Any, **changes: str) -> None:
    """Write what an engine host saves; `changes` falsify its key."""
    launch = host.launch
    key = runtime_key(
        launch.spec, engine="vllm", version="1", device_kind=launch.device_kind, world_size=1, rank=launch.rank
    )
    with CheckpointWriter(Path(launch.save_runtime), [PAGE_BYTES]) as writer:
        with writer.partition() as partition:
            partition.write(bytes(PAGE_BYTES))
        tensors = {"fused": Tensor(0, 0, PAGE_BYTES, "uint8", (PAGE_BYTES,), (1,))}
        writer.commit(tensors, layout="runtime", key={**key, **changes})


async def start(node: Any, spec: Any) -> Any:
    """Start a replica and return its host."""
    count = len(node.warm.hosts) + 1
    node.local.replicas.start(spec)
    return await node.until_host(count)


async def start_and_save(node: Any, spec: Any) -> Any:
    host = await start(node, spec)
    host.become_ready()
    write_layout(host)
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
