"""The CUDA adapter through its interface, with a stand-in for the few calls of torch.cuda: it has not run on a GPU."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sllm.errors import InvalidArgument, OperationFailed
from sllm.loader.memory import space

torch = pytest.importorskip("torch")

from sllm.loader.memory import cuda  # noqa: E402 - needs torch

DEVICE = torch.device("cuda", 0)


class Cuda:
    """What torch.cuda offers the adapter; `calls` has what happened, in order."""

    def __init__(self, *, devices: int = 1, register_error: int = 0, copy_error: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._devices = devices
        self._register_error = register_error
        self._copy_error = copy_error

    def is_available(self) -> bool:
        return self._devices > 0

    def device_count(self) -> int:
        return self._devices

    def cudart(self) -> Any:
        return SimpleNamespace(cudaHostRegister=self._register, cudaHostUnregister=self._unregister)

    def current_stream(self, device: Any) -> str:
        return f"current stream of {device}"

    def Stream(self, device: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.calls.append(("wait for", other)))

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append(("on stream",))
        yield

    def Event(self, *, blocking: bool) -> Any:
        assert blocking, "a waiting thread must not spin"
        number = sum(call[0] == "record" for call in self.calls)
        return SimpleNamespace(
            record=lambda stream: self.calls.append(("record", number)), synchronize=lambda: self._end(number)
        )

    def _end(self, number: int) -> None:
        self.calls.append(("end", number))
        if self._copy_error:
            raise RuntimeError(f"{self._copy_error}\nCUDA kernel errors might be asynchronously reported")

    def _register(self, address: int, size_bytes: int, flags: int) -> int:
        self.calls.append(("register", address, size_bytes, flags))
        return self._register_error

    def _unregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0


def test_memory_is_registered_once_and_unregistered_before_it_is_unmapped() -> None:
    fake = Cuda()
    memory = space.anonymous(4096)
    address = memory.address
    assert cuda.register(memory, cuda=fake)
    assert cuda.register(memory, cuda=fake)
    del memory
    gc.collect()
    assert fake.calls == [("register", address, 4096, cuda.PORTABLE), ("unregister", address)]


def test_memory_that_follows_at_the_same_address_is_registered_anew() -> None:
    fake = Cuda()
    for _ in range(2):
        memory = space.anonymous(4096)
        cuda.register(memory, cuda=fake)
        del memory
        gc.collect()
    assert [call[0] for call in fake.calls] == ["register", "unregister"] * 2


def test_memory_that_cuda_refuses_to_register_is_used_all_the_same_with_a_warning() -> None:
    fake = Cuda(register_error=2)
    memory = space.anonymous(4096)
    with pytest.warns(RuntimeWarning, match="error 2"):
        assert not cuda.register(memory, cuda=fake)
    del memory
    gc.collect()
    assert [call[0] for call in fake.calls] == ["register"]


def test_copies_are_begun_on_a_stream_of_their_own_that_waits_for_earlier_work() -> None:
    fake = Cuda()
    target = torch.zeros(8, dtype=torch.uint8)
    copier = cuda.CudaCopier(target, DEVICE, cuda=fake)
    copier.begin(memoryview(bytearray(b"abc")), 0)
    copier.begin(memoryview(bytearray(b"de")), 5)
    copier.end_oldest()
    copier.end_oldest()
    assert bytes(target.tolist()) == b"abc\0\0de\0"
    assert fake.calls == [
        ("wait for", "current stream of cuda:0"),
        ("on stream",),
        ("record", 0),
        ("on stream",),
        ("record", 1),
        ("end", 0),
        ("end", 1),
    ]


def test_a_copy_that_fails_is_one_line_of_ours() -> None:
    copier = cuda.CudaCopier(torch.zeros(8, dtype=torch.uint8), DEVICE, cuda=Cuda(copy_error="CUDA error: unspecified"))
    copier.begin(memoryview(bytearray(3)), 0)
    with pytest.raises(OperationFailed, match=r"^a copy to cuda:0 failed: CUDA error: unspecified$"):
        copier.end_oldest()


def test_a_copy_that_cannot_begin_is_one_line_of_ours() -> None:
    copier = cuda.CudaCopier(torch.zeros(2, dtype=torch.uint8), DEVICE, cuda=Cuda())
    with pytest.raises(OperationFailed, match="a copy to cuda:0 failed"):
        copier.begin(memoryview(bytearray(3)), 0)


def test_closing_waits_for_all_copies_even_if_they_fail() -> None:
    fake = Cuda(copy_error="CUDA error: lost")
    copier = cuda.CudaCopier(torch.zeros(8, dtype=torch.uint8), DEVICE, cuda=fake)
    copier.begin(memoryview(bytearray(3)), 0)
    copier.begin(memoryview(bytearray(3)), 3)
    copier.close()
    assert [call for call in fake.calls if call[0] == "end"] == [("end", 0), ("end", 1)]


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no CUDA device"):
        cuda.check_device(DEVICE, Cuda(devices=0))
    with pytest.raises(InvalidArgument, match="this machine has 1"):
        cuda.check_device(torch.device("cuda", 1), Cuda())
    cuda.check_device(DEVICE, Cuda())
    cuda.check_device(torch.device("cuda"), Cuda())
