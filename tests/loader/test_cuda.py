"""The CUDA adapter through its interface, with a stand-in for the few calls of torch.cuda: it has not run on a GPU."""

from __future__ import annotations

import gc
import logging
import threading

import pytest
from loader.fake_cuda import Cuda

from sllm.errors import InvalidArgument, OperationFailed
from sllm.loader.memory import space
from sllm.loader.memory.fake import FakeCopier
from sllm.loader.pipeline import copy_in_turn

torch = pytest.importorskip("torch")

from sllm.loader.memory import cuda  # noqa: E402 - needs torch

PAGE = 4096
DEVICE = torch.device("cuda", 0)


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


def test_what_cuda_refuses_is_left_in_no_thread_that_does_anything_else() -> None:
    fake = Cuda(register_error=2)
    memory = space.anonymous(4096)
    with pytest.warns(RuntimeWarning):
        cuda.register(memory, cuda=fake)
    assert threading.current_thread() not in fake.registered_in
    assert not any(thread.is_alive() for thread in fake.registered_in)


def test_a_shared_mapping_is_registered_for_reading_part_by_part() -> None:
    fake = Cuda()
    memory = space.anonymous(3 * PAGE)
    address, flags = memory.address, cuda.PORTABLE | cuda.READ_ONLY
    registration = cuda.Registration(memory, part_bytes=2 * PAGE, cuda=fake)
    assert registration.wait(3 * PAGE)
    registration.close()
    del memory
    gc.collect()
    assert fake.named("register") == [
        ("register", address, 2 * PAGE, flags),
        ("register", address + 2 * PAGE, PAGE, flags),
    ]
    assert sorted(fake.named("unregister")) == [("unregister", address), ("unregister", address + 2 * PAGE)]


def test_the_first_part_can_be_used_while_the_next_is_registered() -> None:
    used = threading.Event()
    memory = space.anonymous(2 * PAGE)
    fake = Cuda(registering=lambda count: None if count == 0 or used.wait(10) else pytest.fail("nobody used it"))
    registration = cuda.Registration(memory, part_bytes=PAGE, cuda=fake)
    assert registration.wait(PAGE)
    assert len(fake.named("register")) == 1
    used.set()
    assert registration.wait(2 * PAGE)


def test_whoever_waits_for_what_cuda_refuses_waits_no_longer(caplog: pytest.LogCaptureFixture) -> None:
    fake = Cuda(register_error=801)
    memory = space.anonymous(3 * PAGE)
    with caplog.at_level(logging.WARNING):
        registration = cuda.Registration(memory, part_bytes=PAGE, cuda=fake)
        assert not registration.wait(PAGE)
        assert not registration.wait(3 * PAGE)
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA does not register the pool's memory: error 801; copies from it are slower"
    ]
    registration.close()
    del memory
    gc.collect()
    assert [call[0] for call in fake.calls] == ["register"]


def test_registering_ends_with_the_part_in_which_it_is_closed() -> None:
    made = threading.Event()
    closed: list[bool] = []

    def close_meanwhile(count: int) -> None:
        made.wait(10)
        closer.start()
        closed.append(not registration.wait(2 * PAGE))

    fake = Cuda(registering=close_meanwhile)
    memory = space.anonymous(2 * PAGE)
    registration = cuda.Registration(memory, part_bytes=PAGE, cuda=fake)
    closer = threading.Thread(target=registration.close)
    made.set()
    assert not registration.wait(2 * PAGE)
    closer.join(10)
    assert closed == [True]
    assert len(fake.named("register")) == 1


def test_chunks_that_cuda_does_not_know_go_through_memory_that_it_does() -> None:
    fake, target = Cuda(), bytearray(10)
    source = memoryview(bytearray(b"abcdefghij"))
    inner = FakeCopier(memoryview(target))
    copier = cuda.StagedCopier(inner, chunk_bytes=3, slots=2, cuda=fake)
    pieces = [(source[start : start + 3], start) for start in range(0, 10, 3)]
    copy_in_turn(pieces, copier, most=2)
    copier.close()
    assert target == source
    assert inner.is_closed
    assert inner.most_under_way == 2
    assert [(size, flags) for _, _, size, flags in fake.named("register")] == [(6, cuda.PORTABLE)]


def test_what_is_staged_is_no_longer_needed_where_it_came_from() -> None:
    target, gate = bytearray(3), threading.Event()
    source = bytearray(b"abc")
    inner = FakeCopier(memoryview(target), before=lambda offset: None if gate.wait(10) else pytest.fail("no copy"))
    copier = cuda.StagedCopier(inner, chunk_bytes=3, slots=1, cuda=Cuda())
    copier.begin(memoryview(source), 0)
    source[:] = b"xyz"
    gate.set()
    copier.end_oldest()
    copier.close()
    assert target == b"abc"


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
    assert fake.named("end") == [("end", 0), ("end", 1)]


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no CUDA device"):
        cuda.check_device(DEVICE, Cuda(devices=0))
    with pytest.raises(InvalidArgument, match="this machine has 1"):
        cuda.check_device(torch.device("cuda", 1), Cuda())
    cuda.check_device(DEVICE, Cuda())
    cuda.check_device(torch.device("cuda"), Cuda())
