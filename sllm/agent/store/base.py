"""What the agent asks of whatever runs its store process."""

from __future__ import annotations

from typing import Protocol

from sllm.agent.store.client import Listener, StoreClient
from sllm.loader.memory.table import Entry


class StoreRunner(Protocol):
    """`size_bytes` is the pool's, or what it will be; `entries` what it held when it was last heard of."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def entries(self) -> tuple[Entry, ...]: ...

    @property
    def kept_back_bytes(self) -> int:
        """Bytes of the pool that are leased though their entry is gone."""

    @property
    def is_there(self) -> bool:
        """False while there is no store process: then `entries` is what the next one will try to keep."""

    def start(self, listener: Listener) -> None:
        """Begin. To be called once, in the running loop."""

    async def client(self) -> StoreClient:
        """Wait for the connection to a store process that is ready."""

    async def close(self, *, stop: bool) -> None:
        """Leave the store process running for the next agent, or `stop` it."""
