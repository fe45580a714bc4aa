"""A grant of a GPU's engine host: what CUDA gets to know, what is copied when, from the pool or through a ring."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loader.fake_cuda import Cuda

from sllm.core.launch import Launch
from sllm.core.runtime_layout import CHECKPOINT, ENGINE, ENGINE_VERSION
from sllm.engine.weights import Weights, open_weights
from sllm.errors import ChunkCorrupt
from sllm.loader.format import Tensor
from sllm.loader.writing import CheckpointWriter

torch = pytest.importorskip("torch")

from sllm.engine import device, vllm_loader  # noqa: E402 - needs torch
from sllm.loader.memory import cuda as cuda_memory  # noqa: E402

Make = Callable[..., Any]
HERE = torch.device("cpu")  # stands for the GPU
CHUNK_BYTES = 1 << 20
SIZE_BYTES = 2 * CHUNK_BYTES + 8192
READ_ONLY = cuda_memory.PORTABLE | cuda_memory.READ_ONLY


@pytest.fixture
def make_gpu_launch(make_launch: Make, tmp_path: Path) -> Make:
    """Return a function that makes a launch for a GPU; without `weights`, of a runtime layout."""

    def make(**changes: Any) -> Launch:
        weights = changes.pop("weights", None) or write_runtime(tmp_path / "runtime")
        launch: Launch = make_launch(**{"device_kind": "cuda", "weights": weights, **changes})
        return launch

    return make


def write_runtime(folder: Path) -> Path:
    """Write a runtime layout of one tensor, in chunks of CHUNK_BYTES whose bytes differ."""
    with CheckpointWriter(folder, [SIZE_BYTES]) as writer:
        with writer.partition() as partition:
            partition.write(b"".join(bytes([n]) * CHUNK_BYTES for n in (1, 2, 3))[:SIZE_BYTES])
        key = {CHECKPOINT: "c", ENGINE: "e", ENGINE_VERSION: "1"}
        writer.commit({"w": Tensor(0, 0, SIZE_BYTES, "uint8", (SIZE_BYTES,), (1,))}, layout="runtime", key=key)
    return folder


def opened(launch: Launch, pool: Any) -> Weights:
    weights = open_weights(launch, *pool.give())
    weights.feed.follow(lambda share: None)
    return weights


def loaded(weights: Weights, fake: Cuda) -> bytes:
    """Do what a loader does, and return what is on the device then."""
    with device.registered(weights, cuda=fake) as registration:
        assert registration is not None
        return bytes(device.on_device(weights, registration, HERE, cuda=fake).numpy())


def permissions_at(address: int) -> str:
    """Return what /proc says of the mapping that begins at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions = line.split()[:2]
        if int(addresses.split("-")[0], 16) == address:
            return permissions
    raise AssertionError("nothing is mapped there")


@pytest.mark.parametrize(("kind", "permissions"), [("cuda", "r--s"), ("cpu", "rw-p")])
def test_a_gpu_has_the_pools_own_pages_and_a_cpu_its_view_of_them(
    make_gpu_launch: Make, make_pool: Make, kind: str, permissions: str
) -> None:
    launch = make_gpu_launch(device_kind=kind)
    weights = opened(launch, make_pool(launch))
    assert weights.memory is not None
    assert weights.is_shared == (kind == "cuda")
    assert permissions_at(weights.memory.address) == permissions


def test_what_is_resident_is_registered_for_reading_and_copied(make_gpu_launch: Make, make_pool: Make) -> None:
    launch, fake = make_gpu_launch(), Cuda()
    pool = make_pool(launch)
    weights = opened(launch, pool)
    assert weights.memory is not None
    address, size_bytes = weights.memory.address, weights.memory.size_bytes
    assert loaded(weights, fake) == pool.content
    assert fake.named("register") == [("register", address, size_bytes, READ_ONLY)]


def test_memory_is_unregistered_and_the_lease_ends_when_it_is_released(make_gpu_launch: Make, make_pool: Make) -> None:
    launch, fake = make_gpu_launch(), Cuda()
    pool = make_pool(launch)
    weights = opened(launch, pool)
    loaded(weights, fake)
    assert pool.feed.recv(100) == b""  # the feed has ended, and holds no memory any more
    assert pool.is_leased
    weights.release()
    gc.collect()
    assert len(fake.named("unregister")) == 1
    assert not pool.is_leased


def test_memory_is_registered_before_its_bytes_have_come(make_gpu_launch: Make, make_pool: Make) -> None:
    launch, fake = make_gpu_launch(ready=0), Cuda()
    pool = make_pool(launch)
    weights = opened(launch, pool)
    with device.registered(weights, cuda=fake) as registration:
        assert registration is not None
        assert registration.wait(SIZE_BYTES)
        with ThreadPoolExecutor(1) as thread:
            copied = thread.submit(device.on_device, weights, registration, HERE, cuda=fake)
            for chunks in (1, 3):
                pool.read_to(chunks)
            assert bytes(copied.result(10).numpy()) == pool.content


def test_what_cuda_does_not_register_is_copied_by_way_of_memory_that_it_does(
    make_gpu_launch: Make, make_pool: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class ReadOnlyRefused(Cuda):
        def _register(self, address: int, size_bytes: int, flags: int) -> int:
            super()._register(address, size_bytes, flags)
            return 801 if flags & cuda_memory.READ_ONLY else 0

    launch, fake = make_gpu_launch(), ReadOnlyRefused()
    pool = make_pool(launch)
    assert loaded(opened(launch, pool), fake) == pool.content
    assert [(size, flags) for _, _, size, flags in fake.named("register")][1:] == [(2 * CHUNK_BYTES, 1)]
    assert "error 801" in caplog.text


@pytest.mark.parametrize("slots", [1, 2])
def test_a_ring_is_copied_from_where_it_is_and_goes_on_with_each_copy(
    make_gpu_launch: Make, make_pool: Make, slots: int
) -> None:
    launch, fake = make_gpu_launch(slots=slots), Cuda()
    pool = make_pool(launch)
    weights = opened(launch, pool)
    with ThreadPoolExecutor(1) as thread:
        copied = thread.submit(loaded, weights, fake)
        for chunk in range(launch.grant.chunks):
            pool.put(chunk, chunk + 1)
            pool.say({"ready": chunk + 1})
            if chunk + 1 < launch.grant.chunks:
                assert pool.feed.recv(100) == b'{"taken": %d}' % (chunk + 1)
        assert copied.result(10) == pool.content
    assert len(fake.named("register")) == 1


def test_a_load_that_fails_ends_the_copies_with_its_own_reason(make_gpu_launch: Make, make_pool: Make) -> None:
    launch, fake = make_gpu_launch(ready=1), Cuda()
    pool = make_pool(launch)
    weights = opened(launch, pool)
    pool.say({"error": "CHUNK_CORRUPT", "message": "chunk 1 of partition-000.bin is not what was written"})
    with pytest.raises(ChunkCorrupt, match="chunk 1"):
        loaded(weights, fake)
    assert len(fake.named("end")) == len(fake.named("record")) == 1


def test_tensors_that_are_copied_one_by_one_wait_until_all_is_registered(
    make_gpu_launch: Make, make_pool: Make, write_weights: Make, tmp_path: Path
) -> None:
    arrived = threading.Event()
    fake = Cuda(registering=lambda count: None if arrived.wait(10) else pytest.fail("nothing arrived"))
    launch = make_gpu_launch(weights=write_weights(tmp_path / "hf"))
    pool = make_pool(launch)
    weights = opened(launch, pool)
    hooks: Any = _Hooks()
    offered = vllm_loader.Offer(weights, launch, hooks)
    with device.registered(weights, cuda=fake) as offered.registration:
        tensors = vllm_loader._tensors(offered)
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(next, tensors)
            weights.wait_all()
            assert not first.done()
            arrived.set()
            name, tensor = first.result(10)
    assert (name, bytes(tensor.numpy())) == ("w", pool.content)
    assert len(fake.named("register")) == 1


class _Hooks:
    def progress(self, share: float) -> None:
        """Nobody is told."""


def test_a_ring_of_tensors_is_private_memory_that_is_not_registered(
    make_gpu_launch: Make, make_pool: Make, write_weights: Make, tmp_path: Path
) -> None:
    launch = make_gpu_launch(weights=write_weights(tmp_path / "hf"), slots=1)
    pool = make_pool(launch)
    weights = opened(launch, pool)
    with device.registered(weights, cuda=Cuda()) as registration:
        assert registration is None
    for chunk in range(launch.grant.chunks):
        pool.put(chunk, chunk + 1)
        pool.say({"ready": chunk + 1})
        assert pool.feed.recv(100) == b'{"taken": %d}' % (chunk + 1)
    weights.wait_all()
    assert weights.memory is not None
    assert bytes(weights.memory.view(0, SIZE_BYTES)) == pool.content
