"""CUDA devices: registered host memory, and asynchronous copies from it. NOT YET RUN ON A GPU.

What would surprise a reader:
- Only page-locked memory that CUDA knows is copied asynchronously and at full speed; mlock does not make it known.
  Registering costs about as much as a first touch of the memory, so a pool is registered once, and stays so. It is a
  process' own: what one process has registered, another must register again.
- Registering pins pages for writing: on a MAP_PRIVATE mapping of a shared pool the kernel first makes a private copy
  of every page, and a mapping that cannot be written is refused. `Registration` therefore asks for a read-only one,
  of a shared mapping. Many drivers have none (cudaDevAttrHostRegisterReadOnlySupported is 0): then a `StagedCopier`
  takes the bytes through a little memory of its own.
- A call that CUDA refuses leaves its error in the thread that made it, and torch reports it there as that of whatever
  comes next. So memory is registered in threads that do nothing else.
- A copy from memory of which only a part is registered is an error, and whether one may cross from a registration into
  the next is not tested: copies here keep to one.
- Memory must be unregistered before it is unmapped.
- A block from torch's allocator may still be used by work queued on the current stream: the copying stream waits for
  that first.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from sllm.errors import CapacityExceeded, InvalidArgument, OperationFailed
from sllm.loader.memory.base import DeviceCopier
from sllm.loader.memory.space import Space, anonymous

log = logging.getLogger(__name__)

PORTABLE = 0x01  # cudaHostRegisterPortable: for all devices of this process
READ_ONLY = 0x08  # cudaHostRegisterReadOnly: the pages are pinned for reading, and the device cannot write to them
PART_BYTES = 256 << 20  # of a registration: chunks divide it, so that no copy crosses from one part into the next

_registered: set[int] = set()  # addresses. Finalizers change it whenever they run, in any thread: they take no lock
_guard = threading.Lock()  # two threads must not register the same memory


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
    with _guard, ThreadPoolExecutor(1, thread_name_prefix="register") as thread:
        device = cuda.current_device()
        outcome = thread.submit(_register, memory, 0, memory.size_bytes, PORTABLE, device, cuda).result()
    if outcome != 0:
        warnings.warn(f"cudaHostRegister of {memory.size_bytes} bytes: error {outcome}", RuntimeWarning, stacklevel=2)
    return outcome == 0


def _register(memory: Space, offset: int, size_bytes: int, flags: int, device: int, cuda: Any) -> int:
    """Return CUDA's error, 0 for none. Call it in a thread that does nothing else with CUDA."""
    address = memory.address + offset
    if address in _registered:
        return 0
    with cuda.device(device):
        outcome = int(cuda.cudart().cudaHostRegister(address, size_bytes, flags))
    if outcome == 0:
        _registered.add(address)
        # Of an object's finalizers the latest runs first: before the one that unmaps.
        weakref.finalize(memory.buffer, _unregister, address, cuda).atexit = False
    return outcome


class Registration:
    """Makes a shared mapping that cannot be written known to CUDA, in a thread of its own, from its first byte on.

    It is done in parts of `part_bytes`, so that copies from the first ones go beside the registering of later ones.
    No byte of the memory need be there yet. What is registered stays so until it is unmapped. For the device that is
    current where this is made.
    """

    def __init__(self, memory: Space, *, part_bytes: int = PART_BYTES, cuda: Any = torch.cuda) -> None:
        self._part_bytes = part_bytes
        self._cuda = cuda
        self._device = cuda.current_device()
        self._changed = threading.Condition()
        self._known_bytes = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._run, args=(memory,), name="register", daemon=True)
        self._thread.start()

    def wait(self, end: int) -> bool:
        """Return True once CUDA knows all bytes before `end`, False once it is certain that it will not.

        Copies work then too, slower. A warning in the log has said so.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._known_bytes >= end)
            return self._known_bytes >= end

    def close(self) -> None:
        """End after the part that is being registered."""
        with self._changed:
            self._is_over = True
        self._thread.join()

    def _run(self, memory: Space) -> None:
        try:
            for start in range(0, memory.size_bytes, self._part_bytes):
                end = min(start + self._part_bytes, memory.size_bytes)
                if self._is_over or not self._is_known(memory, start, end - start):
                    return
                with self._changed:
                    self._known_bytes = end
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _is_known(self, memory: Space, offset: int, size_bytes: int) -> bool:
        outcome = _register(memory, offset, size_bytes, PORTABLE | READ_ONLY, self._device, self._cuda)
        if outcome != 0:
            log.warning("CUDA does not register the pool's memory: error %d; copies from it are slower", outcome)
        return outcome == 0


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


class StagedCopier:
    """Copies chunks (of at most `chunk_bytes`) of memory that CUDA does not know, by way of `slots` places that it
    does: a DeviceCopier over `copier`. While one chunk goes to the device the next is copied into its place, by torch's
    threads. At most `slots` copies may be under way.

    Prior art: what cudaMemcpy itself does with such memory, though one chunk after the other and in one thread.
    """

    def __init__(self, copier: DeviceCopier, *, chunk_bytes: int, slots: int, cuda: Any = torch.cuda) -> None:
        self._copier = copier
        self._chunk_bytes = chunk_bytes
        self._slots = slots
        self._begun = 0
        self._staging = anonymous(slots * chunk_bytes)
        register(self._staging, cuda=cuda)

    def begin(self, source: memoryview, offset: int) -> None:
        place = self._staging.view(self._begun % self._slots * self._chunk_bytes, len(source))
        torch.frombuffer(place, dtype=torch.uint8).copy_(torch.frombuffer(source, dtype=torch.uint8))
        self._copier.begin(place, offset)
        self._begun += 1

    def end_oldest(self) -> None:
        self._copier.end_oldest()

    def close(self) -> None:
        self._copier.close()


def _unregister(address: int, cuda: Any) -> None:
    _registered.discard(address)
    cuda.cudart().cudaHostUnregister(address)
