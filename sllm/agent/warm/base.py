"""What the agent asks of a warm process and of the engine hosts that it forks."""

from __future__ import annotations

import signal
from typing import NamedTuple, Protocol

from sllm.core.launch import Launch, WarmReady


class HostFds(NamedTuple):
    """What an engine host is given, in the order in which it is sent: its grant's two descriptors, and its log."""

    lease: int
    feed: int
    log: int


class HostProcess(Protocol):
    """The process of one engine host, and its process group."""

    @property
    def pid(self) -> int: ...

    async def ended(self) -> str:
        """Return how it ended (`signal 9`, `exit code 1`) once it has; any number of callers may wait."""
        ...

    def signal(self, number: signal.Signals) -> None:
        """Signal its whole group; no error if it is gone."""
        ...


class Warm(Protocol):
    """`about` is what the warm process said when it was ready; None while there is none that can fork."""

    @property
    def about(self) -> WarmReady | None: ...

    async def ready(self) -> WarmReady:
        """Wait until it can fork. Raises EngineFailed or InvalidConfiguration if it ends before that."""
        ...

    async def fork(self, launch: Launch, fds: HostFds) -> HostProcess:
        """Fork an engine host, waiting for the warm process if need be. Raises EngineFailed.

        The host gets descriptors of its own: the caller's may be closed afterwards.
        """
        ...

    async def close(self) -> None: ...
