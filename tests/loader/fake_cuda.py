"""A stand-in for the few calls of torch.cuda that the CUDA adapter makes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any


class Cuda:
    """What torch.cuda offers the adapter; `calls` has what happened, in order. `registering` is called before each
    registration with how many there were, in the thread that asks for it; it may block."""

    def __init__(
        self,
        *,
        devices: int = 1,
        register_error: int = 0,
        copy_error: str = "",
        registering: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.registered_in: list[threading.Thread] = []
        self._registering = registering
        self._devices = devices
        self._register_error = register_error
        self._copy_error = copy_error

    def is_available(self) -> bool:
        return self._devices > 0

    def device_count(self) -> int:
        return self._devices

    def current_device(self) -> int:
        return 0

    def device(self, index: int) -> contextlib.AbstractContextManager[None]:
        assert index < self._devices
        return contextlib.nullcontext()

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

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """Return the calls of these names."""
        return [call for call in self.calls if call[0] in names]

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
        self._registering(len(self.registered_in))
        self.registered_in.append(threading.current_thread())
        self.calls.append(("register", address, size_bytes, flags))
        return self._register_error

    def _unregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0
