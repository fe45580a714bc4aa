"""CUDA devices: registered host memory, and asynchronous copies from it. NOT YET RUN ON A GPU.

What would surprise a reader:
- Only page-locked memory that CUDA knows is copied asynchronously and at full speed; mlock does not make it known.
  Registering costs about as much as a first touch of the memory, so a pool is registered once, and stays so.
- Registering pins pages for writing: on a MAP_PRIVATE mapping of a shared pool the kernel first makes a private copy
  of every page. So only memory of the library's own is registered here.
- Memory must be unregistered before it is unmapped.
- A block from torch's allocator may still be used by work queued on the current stream: the copying stream waits for
  that first.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import deque
from typing import Any

import torch

from sllm.errors import CapacityExceeded, InvalidArgument, OperationFailed
from sllm.loader.memory.space import Space

PORTABLE = 0x01  # cudaHostRegisterPortable: for all devices of this process

_registered: dict[int, int] = {}  # address -> bytes
_guard = threading.RLock()  # a finalizer may run in the middle of `register`


def check_device(device: torch.device, cuda: Any = torch.cuda) -> None:
    """Raises InvalidArgument if there is no such device."""
    if not cuda.is_available():
        raise InvalidArgument(f"no CUDA device for {str(device)!r}", hint='load with device="cpu"')
    if device.index is not None and device.index >= cuda.device_count():
        raise InvalidArgument(f"there is no {device}: this machine has {cuda.device_count()}")


def register(memory: Space, *, cuda: Any = torch.cuda) -> bool:
    """Make host memory known to CUDA, once, for as long as it lives. False (with a warning) if CUDA refuses.

    Copies from it work then too, but one after the other with the reads, and slower.
    """
    with _guard:
        if memory.address in _registered:
            return True
        outcome = int(cuda.cudart().cudaHostRegister(memory.address, memory.size_bytes, PORTABLE))
        if outcome != 0:
            warnings.warn(
                f"cudaHostRegister of {memory.size_bytes} bytes: error {outcome}", RuntimeWarning, stacklevel=2
            )
            return False
        _registered[memory.address] = memory.size_bytes
    # Of an object's finalizers the latest runs first: before the one that unmaps.
    weakref.finalize(memory.buffer, _unregister, memory.address, cuda).atexit = False
    return True


def arena(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Return device memory, as bytes. Raises CapacityExceeded."""
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise CapacityExceeded(f"{device} has not {size_bytes} bytes free") from error


class CudaCopier:
    """Copies chunks of registered memory into `target`, bytes on one device, on a stream of its own: a DeviceCopier."""

    def __init__(self, target: torch.Tensor, device: torch.device, *, cuda: Any = torch.cuda) -> None:
        self._target = target
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)
        self._stream.wait_stream(cuda.current_stream(device))
        # Each copy's event, and its source, which must live until then.
        self._under_way: deque[tuple[Any, torch.Tensor]] = deque()

    def begin(self, source: memoryview, offset: int) -> None:
        try:
            host = torch.frombuffer(source, dtype=torch.uint8)
            with self._cuda.stream(self._stream):
                self._target[offset : offset + len(source)].copy_(host, non_blocking=True)
                event = self._cuda.Event(blocking=True)  # waiting must not spin: other threads read meanwhile
                event.record(self._stream)
        except RuntimeError as error:
            raise self._failed(error) from error
        self._under_way.append((event, host))

    def end_oldest(self) -> None:
        event, _ = self._under_way.popleft()
        try:
            event.synchronize()
        except RuntimeError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        while self._under_way:
            with contextlib.suppress(OperationFailed):
                self.end_oldest()

    def _failed(self, error: RuntimeError) -> OperationFailed:
        first_line = str(error).partition("\n")[0]
        return OperationFailed(f"a copy to {self._device} failed: {first_line}")


def _unregister(address: int, cuda: Any) -> None:
    with _guard:
        del _registered[address]
        cuda.cudart().cudaHostUnregister(address)
