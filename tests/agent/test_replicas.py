"""The life of replicas, against engine hosts that do as the test says. Everything but processes is real."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.agent import hosts
from sllm.core.ids import DeviceId, ReplicaId
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState
from sllm.errors import CapacityExceeded, Conflict, EngineFailed, InvalidArgument, NotFound, StaleGeneration

MakeNode = Callable[..., Any]
MakeSpec = Callable[..., Any]


async def serving(node: Any, spec: Any) -> Any:
    """Start a replica and return its host once it is ready."""
    node.local.replicas.start(spec)
    host = await node.until_host()
    host.become_ready()
    await node.until(lambda: node.state() == "ready")
    return host


async def test_a_start_leases_forks_and_becomes_ready(make_node: MakeNode, make_spec: MakeSpec, model: Path) -> None:
    node = make_node(kv_cache_bytes=123, grace_s=7.0)
    digest = await node.add(model)
    host = await serving(node, make_spec(digest))
    launch = host.launch
    assert (launch.kv_cache_bytes, launch.grace_s, launch.device_kind) == (123, 7.0, "cpu")
    assert launch.memory_bytes == 1 << 30
    assert launch.grant.digest == digest
    assert Path(launch.weights_dir, "manifest.json").exists()
    assert Path(launch.execution_dir, "config.json").exists()
    assert node.local.replicas.leases.holders == {DeviceId("fake-0"): launch.spec.id}


async def test_a_host_that_says_it_failed_is_ended_and_frees_its_devices(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node()
    node.local.replicas.start(make_spec(await node.add(model)))
    host = await node.until_host()
    host.say(state=ReplicaState.FAILED, error="no kernel", error_reason="ENGINE_FAILED")
    await node.until(lambda: not node.local.replicas.leases.holders)
    assert node.status().error == "no kernel"
    assert signal.SIGKILL in host.signals
    node.local.replicas.stop(host.launch.spec.id, 1, 0.0)
    assert node.state() == "gone"


async def test_a_host_that_dies_is_a_failure_with_its_last_words(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node()
    host = await serving(node, make_spec(await node.add(model)))
    node.log_path(host.launch.spec.id).write_text("a\nOOM!\n")
    host.die("signal 9")
    await node.until(lambda: node.state() == "failed" and not node.local.replicas.leases.holders)
    assert node.status().error == "engine died: signal 9; its last words: a | OOM!"
    assert not node.local.records.path(host.launch.spec.id).exists()


async def test_a_host_that_stops_answering_is_ended_and_frees_its_devices(
    make_node: MakeNode, make_spec: MakeSpec, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "UNRESPONSIVE_S", 0.5)
    monkeypatch.setattr(hosts, "ATTACH_S", 0.1)
    node = make_node()
    host = await serving(node, make_spec(await node.add(model)))
    host.fall_silent()
    await node.until(lambda: not node.local.replicas.leases.holders)
    assert node.state() == "failed"
    assert node.status().error == "the engine host does not answer"
    assert node.status().error_reason == "ENGINE_FAILED"
    assert host.signals == [signal.SIGKILL]
    assert host.attempts > 2


async def test_a_host_that_answers_again_in_time_lives_on(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node()
    host = await serving(node, make_spec(await node.add(model)))
    for running in (1, 2):
        host.fall_silent()
        await host.until_asked()
        host.say(running=running)
        host.answer()
        await node.until(lambda running=running: node.status().running == running)
    assert node.state() == "ready"
    assert host.signals == []


async def test_a_host_that_drains_and_stops_answering_is_gone_not_failed(
    make_node: MakeNode, make_spec: MakeSpec, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "UNRESPONSIVE_S", 0.2)
    node = make_node()
    host = await serving(node, make_spec(await node.add(model)))
    node.local.replicas.stop(host.launch.spec.id, 1, 3600.0)
    host.fall_silent()
    await node.until(lambda: node.state() == "gone")
    assert node.local.replicas.leases.holders == {}


async def test_a_host_that_dies_before_it_listens_is_a_failure(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node()
    node.warm.silent = True
    node.local.replicas.start(make_spec(await node.add(model)))
    await node.until(lambda: node.warm.hosts)
    node.warm.hosts[0].die("exit code 1")
    await node.until(lambda: node.state() == "failed")
    assert "engine died: exit code 1" in node.status().error


async def test_a_failed_fork_is_a_failure(make_node: MakeNode, make_spec: MakeSpec, model: Path) -> None:
    node = make_node()
    node.warm.failure = EngineFailed("the warm process ended with code 1: no vllm")
    node.local.replicas.start(make_spec(await node.add(model)))
    await node.until(lambda: node.state() == "failed" and not node.local.replicas.leases.holders)
    assert "no vllm" in node.status().error


@pytest.mark.parametrize("silent", [True, False])
async def test_a_start_has_a_limit(make_node: MakeNode, make_spec: MakeSpec, model: Path, silent: bool) -> None:
    node = make_node(start_timeout_s=0.5)
    node.warm.silent = silent
    node.local.replicas.start(make_spec(await node.add(model)))
    await node.until(lambda: node.state() == "failed" and not node.local.replicas.leases.holders)
    assert "within 0.5 s" in node.status().error
    assert signal.SIGKILL in node.warm.hosts[0].signals


async def test_the_limit_is_for_all_steps_of_a_start_together(
    make_node: MakeNode, make_spec: MakeSpec, make_model: Callable[..., Path]
) -> None:
    limit_s, turn_s = 1.0, 0.8
    node = make_node(start_timeout_s=limit_s)
    first, second = [await node.add(make_model(name, (4 << 20) + n), name) for n, name in enumerate(["a", "b"])]
    node.reading.hold()
    loop = asyncio.get_running_loop()
    async with node.local.weights.granted(node.local.store.with_digest(first)):
        began = loop.time()
        node.local.replicas.start(make_spec(second))
        loop.call_later(turn_s, node.reading.go_on)
        await node.until_host()  # which never becomes ready
        await node.until(lambda: node.state() == "failed")
    assert loop.time() - began < limit_s + turn_s
    assert node.status().error_reason == "ENGINE_FAILED"


async def test_a_replica_that_serves_is_given_time_to_drain(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node()
    host = await serving(node, make_spec(await node.add(model)))
    node.local.replicas.stop(host.launch.spec.id, 1, 30.0)
    assert node.state() == "draining"
    host.die("exit code 0")
    await node.until(lambda: node.state() == "gone")
    assert host.stops in ([], [30.0])
    assert node.local.replicas.leases.holders == {}


async def test_a_drain_is_cut_short_by_a_stop(make_node: MakeNode, make_spec: MakeSpec, model: Path) -> None:
    node = make_node()
    host = await serving(node, make_spec(await node.add(model)))
    node.local.replicas.stop(host.launch.spec.id, 1, 3600.0)
    node.local.replicas.stop(host.launch.spec.id, 1, 0.0)
    await node.until(lambda: node.state() == "gone")
    assert host.stops[-1] == 0.0


async def test_a_host_that_does_not_stop_is_made_to(
    make_node: MakeNode, make_spec: MakeSpec, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "STOP_MARGIN_S", 0.05)
    monkeypatch.setattr(hosts, "TERMINATE_S", 0.05)
    node = make_node()
    host = await serving(node, make_spec(await node.add(model)))
    host.stubborn = True
    node.local.replicas.stop(host.launch.spec.id, 1, 0.0)
    await node.until(lambda: node.state() == "gone")
    assert host.signals[:2] == [signal.SIGTERM, signal.SIGKILL]


async def test_a_start_is_called_off_at_any_moment(make_node: MakeNode, make_spec: MakeSpec, model: Path) -> None:
    node = make_node()
    spec = make_spec(await node.add(model))
    node.local.replicas.start(spec)
    node.local.replicas.stop(spec.id, 1, 0.0)  # before its first step
    await node.until(lambda: node.state() == "gone")
    assert (node.warm.hosts, node.local.replicas.leases.holders) == ([], {})
    node.local.replicas.start(spec)
    host = await node.until_host()  # while it is built
    node.local.replicas.stop(spec.id, 1, 60.0)
    await node.until(lambda: node.state() == "gone")
    assert host.signals == [signal.SIGKILL]
    await unused(node, spec.digest)


async def unused(node: Any, digest: str) -> None:
    """Wait until nobody holds a checkpoint's memory: it can be freed then."""
    node.local.weights.forget(digest)
    await node.until(lambda: node.local.weights.in_memory == ())


async def test_a_host_is_forked_while_its_weights_are_read(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node()
    spec = make_spec(await node.add(model))
    node.reading.hold()
    node.local.replicas.start(spec)
    host = await node.until_host()
    await node.until(lambda: node.status().phase == "loading")
    assert host.launch.grant.ready_chunks == 0
    assert list(node.status().phases_s) == ["queued", "forking"]


async def test_a_start_that_is_called_off_while_it_loads_calls_off_the_read(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node()
    spec = make_spec(await node.add(model))
    node.reading.hold()
    node.local.replicas.start(spec)
    await node.until_host()
    node.local.replicas.stop(spec.id, 1, 0.0)
    await node.until(lambda: node.state() == "gone")
    node.reading.go_on()
    await node.until(lambda: node.local.weights.in_memory == ())


async def test_no_host_is_forked_from_a_checkpoint_with_a_damaged_execution_file(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node()
    digest = await node.add(model)
    stored = node.local.store.with_digest(digest)
    config = node.local.store.folder(stored) / "config.json"
    config.write_text(config.read_text().replace("128", "129"))
    node.local.replicas.start(make_spec(digest))
    await node.until(lambda: node.state() == "failed" and not node.local.replicas.leases.holders)
    assert node.status().error_reason == "EXECUTION_FILE_DAMAGED"
    assert "config.json" in node.status().error
    assert node.warm.hosts == []
    assert node.local.store.damaged() == (stored,)
    await unused(node, digest)


async def test_a_start_that_waits_for_its_turn_is_queued_and_can_be_called_off(
    make_node: MakeNode, make_spec: MakeSpec, make_model: Callable[..., Path]
) -> None:
    node = make_node(devices=2)
    first, second = [await node.add(make_model(name, (4 << 20) + n), name) for n, name in enumerate(["a", "b"])]
    node.reading.hold()
    node.local.replicas.start(make_spec(first))
    await node.until_host()
    waiting = make_spec(second, id=ReplicaId("rep-2"), devices=(DeviceId("fake-1"),))
    node.local.replicas.start(waiting)
    node.local.replicas.stop(waiting.id, 1, 0.0)
    await node.until(lambda: node.state(waiting.id) == "gone")
    assert len(node.warm.hosts) == 1


async def test_a_start_does_not_wait_for_its_turn_beyond_its_limit(
    make_node: MakeNode, make_spec: MakeSpec, make_model: Callable[..., Path]
) -> None:
    node = make_node(start_timeout_s=0.2)
    first, second = [await node.add(make_model(name, (4 << 20) + n), name) for n, name in enumerate(["a", "b"])]
    node.reading.hold()
    async with node.local.weights.granted(node.local.store.with_digest(first)):
        node.local.replicas.start(make_spec(second))
        await node.until(lambda: node.state() == "failed" and not node.local.replicas.leases.holders)
    assert node.status().error_reason == "DEADLINE_EXCEEDED"
    assert node.warm.hosts == []


async def test_a_start_does_not_wait_for_a_store_process_beyond_its_limit(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node(start_timeout_s=0.2)
    digest = await node.add(model)
    node.store_process.is_silent = True
    node.local.replicas.start(make_spec(digest))
    await node.until(lambda: node.state() == "failed" and not node.local.replicas.leases.holders)
    assert node.status().error_reason == "DEADLINE_EXCEEDED"


async def test_commands_are_fenced_and_may_be_repeated(make_node: MakeNode, make_spec: MakeSpec, model: Path) -> None:
    node = make_node(devices=2)
    digest = await node.add(model)
    spec = make_spec(digest, generation=5)
    replicas = node.local.replicas
    replicas.start(spec)
    replicas.start(spec)
    with pytest.raises(Conflict, match="another specification"):
        replicas.start(make_spec(digest, generation=5, capacity=9))
    with pytest.raises(StaleGeneration):
        replicas.start(make_spec(digest, generation=4))
    with pytest.raises(StaleGeneration):
        replicas.stop(spec.id, 4, 0.0)
    with pytest.raises(Conflict, match="leased"):
        replicas.start(make_spec(digest, id=ReplicaId("rep-2")))
    replicas.stop(ReplicaId("rep-unknown"), 1, 0.0)
    assert len(replicas.statuses()) == 1


async def test_refuses_what_it_has_not_or_cannot_hold(make_node: MakeNode, make_spec: MakeSpec, model: Path) -> None:
    node = make_node(memory_bytes=1000)
    with pytest.raises(NotFound, match="sha256:none"):
        node.local.replicas.start(make_spec("sha256:none"))
    with pytest.raises(CapacityExceeded, match="4194304 bytes, its devices have 1000"):
        node.local.replicas.start(make_spec(await node.add(model)))
    assert node.local.replicas.leases.holders == {}


async def test_two_starts_of_one_checkpoint_share_the_read(
    make_node: MakeNode, make_spec: MakeSpec, model: Path
) -> None:
    node = make_node(devices=2)
    digest = await node.add(model)
    second = ReplicaId("rep-2")
    node.local.replicas.start(make_spec(digest))
    node.local.replicas.start(make_spec(digest, id=second, devices=(DeviceId("fake-1"),)))
    await node.until(lambda: len(node.warm.hosts) == 2)
    assert node.reading.opened == ["demo"]
    assert len(node.local.weights.in_memory) == 1


async def test_reads_are_one_at_a_time_and_what_is_in_memory_does_not_wait(
    make_node: MakeNode, make_spec: MakeSpec, make_model: Callable[..., Path], model: Path
) -> None:
    node = make_node(devices=3)
    resident = await node.add(model, "resident")
    first, second = [await node.add(make_model(name, (4 << 20) + n), name) for n, name in enumerate(["a", "b"])]
    node.local.weights.prefetch(node.local.store.with_digest(resident))
    await node.until(lambda: any(held.ready for held in node.local.weights.in_memory))
    node.reading.hold()
    for number, digest in enumerate([first, second, resident]):
        devices = (DeviceId(f"fake-{number}"),)
        node.local.replicas.start(make_spec(digest, id=ReplicaId(f"rep-{number}"), devices=devices))
    await node.until(lambda: len(node.warm.hosts) == 2)
    assert {host.launch.spec.id for host in node.warm.hosts} == {"rep-0", "rep-2"}
    assert node.status("rep-1").phase == "queued"
    node.reading.go_on()
    await node.until(lambda: len(node.warm.hosts) == 3)


@pytest.mark.parametrize("before", [Priority.PREWARM, Priority.PREFETCH])
async def test_a_start_that_is_asked_for_again_more_urgently_goes_before_what_is_read_for_less(
    make_node: MakeNode, make_spec: MakeSpec, make_model: Callable[..., Path], before: Priority
) -> None:
    node = make_node(devices=2)
    digests = [await node.add(make_model(name, (4 << 20) + n), name) for n, name in enumerate(["a", "b"])]
    node.reading.hold()
    first, second = (
        make_spec(digest, id=ReplicaId(f"rep-{number}"), devices=(DeviceId(f"fake-{number}"),))
        for number, digest in enumerate(digests)
    )
    node.local.replicas.start(first, Priority.PREWARM)
    await node.until_host()
    node.local.replicas.start(second, before)
    node.local.replicas.start(second, before)  # the same again changes nothing
    assert node.status("rep-1").phase == "queued"
    node.local.replicas.start(second, Priority.REQUEST)
    await node.until(lambda: len(node.warm.hosts) == 2)
    assert node.status("rep-1").phase != "queued"
    assert node.local.weights.loads == ()  # the first has not ended
    node.reading.go_on()
    await node.until(lambda: len(node.local.weights.loads) == 2)


async def test_detaching_leaves_the_host_alone(make_node: MakeNode, make_spec: MakeSpec, model: Path) -> None:
    node = make_node()
    host = await serving(node, make_spec(await node.add(model)))
    await node.local.close(stop_hosts=False)
    assert (host.signals, host.stops) == ([], [])
    assert node.local.replicas.leases.holders != {}
    node.local.close = nothing


async def nothing(**_: Any) -> None:
    """Stands for the close that the test has done itself."""


async def test_what_a_replica_would_read_is_read_ahead_and_what_nobody_needs_goes_for_it(
    make_node: MakeNode, make_spec: MakeSpec, make_model: Callable[..., Path]
) -> None:
    node = make_node(devices=2)
    wanted, idle, used = [
        await node.add(make_model(name, (4 << 20) + n), name) for n, name in enumerate(["wanted", "idle", "used"])
    ]
    await serving(node, make_spec(used))
    node.local.weights.prefetch(node.local.store.with_digest(idle))
    await node.until(lambda: len(node.local.weights.in_memory) == 2)
    spec = make_spec(wanted, id=ReplicaId(""), devices=(DeviceId("fake-1"),))
    await node.local.replicas.prefetch(spec, (idle, used, wanted))
    await node.until(lambda: {m.digest for m in node.local.weights.in_memory if m.ready} == {wanted, used})
    assert set(node.local.replicas.leases.holders) == {DeviceId("fake-0")}
    with pytest.raises(InvalidArgument, match="does not have the devices fake-7"):
        await node.local.replicas.prefetch(make_spec(wanted, devices=(DeviceId("fake-7"),)), ())
    with pytest.raises(NotFound):
        await node.local.replicas.prefetch(make_spec("nothing"), ())
